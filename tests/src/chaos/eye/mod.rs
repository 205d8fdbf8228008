//! The independent eye: twice a second it looks at the process table, the guests' serial logs and the logs of all
//! daemons, every other second at what the API lists, and judges by the books of what was asked for and what was broken.
//!
//! It shares no code with the controller, the agents or their protocol: what Dalgu says is read as JSON from the command
//! line, and believed only where a rule is about what Dalgu says. Run beside the clients and the faults by
//! [`super::run`]; it changes nothing.

mod logs;
pub mod processes;
mod tale;
mod torn;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use self::logs::{Forbidden, Logs};
use self::processes::{Process, scan};
use self::tale::{Found, Tale};
use self::torn::Torn;
use super::books::{Books, Want};
use crate::e2e::{story, words};
use crate::lab::Lab;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// So many looks apart the API is asked.
const ASK_EACH: u32 = 4;
/// How long a VM may be without a process, or with one too many, before it counts: two looks, and not one.
const SETTLE: Duration = Duration::from_millis(900);
/// After its QEMU was killed a guest that counts on for so long was not ended by it: it had moved.
const SURVIVED: Duration = Duration::from_secs(20);

/// What libvirt asks of QEMU when it gives a VM its disks back. When a migration is torn at its switch-over, by the death of a
/// libvirtd or of an agent that carried it, the source's libvirt gives them to the VM there, and has it go on where it was not
/// told that the other arrived; the destination's gives them to the copy that has arrived. One of them is refused, and has
/// started nothing: what has arrived is frozen until the source says that it has let go, or until both have settled, so that
/// without locks one copy runs too. It is told apart (see [`Torn`]), and the copies are counted as ever. So is what follows: once both have
/// settled, the source's agent has its VM go on, again and again until the QEMU that was to take over has ended and let go of the locks.
const GIVE_BACK: [&str; 2] = ["'blockdev-set-active'", "'cont'"];

/// Whether a refusal is of disks that libvirt gives back by itself: its own words, or those of the QEMU that it asked. What else an
/// agent asked for is in the agent's log too, and a QEMU that is started names the option.
fn gives_back(line: &str) -> bool {
    let (file, said) = line.split_once(": ").unwrap_or_default();
    let goes_on = said.contains(" step=Resume ") && said.contains("'cont'");
    if file.ends_with("-agent.log") && goes_on {
        return true;
    }
    let by_libvirt =
        file.ends_with("-libvirtd.log") && GIVE_BACK.iter().any(|command| said.contains(command));
    by_libvirt || said.starts_with("Failed to get")
}

/// One guest's files and tale.
#[derive(Default)]
struct Guest {
    /// When its logs were read last.
    read: Option<Instant>,
    tale: Tale,
    pages: Vec<(File, (u64, u64), u64)>,
}

/// The eye.
pub struct Eye {
    lab: Lab,
    books: Rc<RefCell<Books>>,
    guests: BTreeMap<String, Guest>,
    before: Vec<Process>,
    /// Since when a rule is broken for a VM; it counts when it stays so.
    doubtful: BTreeMap<(String, &'static str), Instant>,
    logs: Logs,
    torn: Torn,
    /// Epoch and generation that the API told last.
    numbers: BTreeMap<String, (u64, u64)>,
}

impl Eye {
    /// An eye on a lab.
    #[must_use]
    pub fn new(lab: &Lab, books: Rc<RefCell<Books>>) -> Self {
        Self {
            lab: lab.clone(),
            books,
            guests: BTreeMap::new(),
            before: Vec::new(),
            doubtful: BTreeMap::new(),
            logs: Logs::default(),
            torn: Torn::default(),
            numbers: BTreeMap::new(),
        }
    }

    /// Looks until it is dropped.
    pub async fn watch(mut self) {
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = 0_u32;
        loop {
            tick.tick().await;
            self.look().await;
            looks += 1;
            if looks.is_multiple_of(ASK_EACH) {
                self.listen_to_the_api().await;
            }
        }
    }

    async fn look(&mut self) {
        let now = scan(&self.lab.hosts());
        self.note_changes(&now);
        self.count_copies(&now).await;
        self.compare_with_wishes(&now);
        self.read_guests();
        self.torn.note(&now);
        for Forbidden { rule, line, host } in self.logs.read_on(&self.lab) {
            let mut books = self.books.borrow_mut();
            if gives_back(&line) && self.torn.is_at(host, &books.carriers_killed) {
                books.tell(&format!(
                    "eye: one side of a torn migration was refused the lock: {line}"
                ));
                books.checked("locks refused to one side of a torn migration");
            } else {
                books.violation(rule, line);
            }
        }
        self.before = now;
    }

    /// Writes down what came and went; what went on a host without power is that host's victim.
    fn note_changes(&mut self, now: &[Process]) {
        let key = |process: &Process| (process.uid.clone(), process.host, process.pid);
        let (old, new): (BTreeSet<_>, BTreeSet<_>) = (
            self.before.iter().map(key).collect(),
            now.iter().map(key).collect(),
        );
        let mut books = self.books.borrow_mut();
        for (uid, host, pid) in old.difference(&new) {
            let dark = books.dark.contains_key(host);
            let name = name_of(&books, uid);
            books.tell(&format!("eye: QEMU of {name} on h{host} ended (process {pid})"));
            if dark {
                books.killed(uid);
            }
        }
        for (uid, host, pid) in new.difference(&old) {
            let name = name_of(&books, uid);
            books.tell(&format!("eye: QEMU of {name} on h{host} came (process {pid})"));
        }
    }

    /// Never two running copies.
    async fn count_copies(&mut self, now: &[Process]) {
        let mut copies: BTreeMap<&str, Vec<&Process>> = BTreeMap::new();
        for process in now {
            copies.entry(&process.uid).or_default().push(process);
        }
        for (uid, copies) in copies {
            self.books.borrow_mut().checked("copies of a VM by its processes");
            let places: BTreeSet<_> = copies.iter().map(|copy| copy.host).collect();
            let started = copies.iter().filter(|copy| !copy.incoming).count();
            let crowd = copies.len() > 2 || started > 1 || places.len() < copies.len();
            self.judge(
                uid,
                "one copy: at most one QEMU that was started, and one that waits",
                crowd,
                || format!("{copies:?}"),
            );
            if copies.len() == 2 && self.both_run(uid, &copies).await {
                let rule = "one copy: libvirt does not show two running";
                let evidence = format!("{}: {copies:?}", name_of(&self.books.borrow(), uid));
                self.books.borrow_mut().violation(rule, evidence);
            }
        }
    }

    /// Asks libvirt about both hosts; the first once more, so that a switch-over between the questions is not taken for
    /// two running copies.
    async fn both_run(&self, uid: &str, copies: &[&Process]) -> bool {
        self.books
            .borrow_mut()
            .checked("copies of a moving VM by libvirt");
        let [one, other] = [copies[0].host, copies[1].host];
        for host in [one, other, one] {
            let answer = timeout(Duration::from_secs(1), self.lab.virsh(host, &["domstate", uid])).await;
            if !answer.is_ok_and(|answer| answer.is_ok_and(|state| state.trim() == "running")) {
                return false;
            }
        }
        true
    }

    /// What was asked for and done stays so.
    fn compare_with_wishes(&mut self, now: &[Process]) {
        let subjects = self.books.borrow().subjects.clone();
        for (uid, subject) in &subjects {
            let here = now.iter().any(|process| process.uid == *uid);
            let settled = subject.settled.is_some_and(|since| since.elapsed() > SETTLE);
            let sound = settled && subject.victim.is_none();
            self.books.borrow_mut().checked("what was done stays done");
            let ended = sound && matches!(subject.want, Want::Running | Want::Paused) && !here;
            self.judge(uid, "no VM stops that nobody asked to stop", ended, || {
                "it has no QEMU".to_owned()
            });
            let started = settled && matches!(subject.want, Want::Off | Want::Gone) && here;
            self.judge(uid, "no VM runs that was stopped or deleted", started, || {
                format!(
                    "{:?}",
                    now.iter()
                        .filter(|process| process.uid == *uid)
                        .collect::<Vec<_>>()
                )
            });
        }
    }

    /// Notes a violation where the rule is broken at two looks.
    fn judge(&mut self, uid: &str, rule: &'static str, broken: bool, evidence: impl FnOnce() -> String) {
        let key = (uid.to_owned(), rule);
        if !broken {
            self.doubtful.remove(&key);
            return;
        }
        let since = *self.doubtful.entry(key).or_insert_with(Instant::now);
        // Only once: when it lasts, the evidence changes, and the fault does not.
        if since.elapsed() > SETTLE && since.elapsed() <= SETTLE + LOOK * 3 {
            let mut books = self.books.borrow_mut();
            let name = name_of(&books, uid);
            let known = books
                .violations
                .iter()
                .any(|known| known.rule == rule && known.evidence.starts_with(&name));
            if !known {
                books.violation(rule, format!("{name}: {}", evidence()));
            }
        }
    }

    /// Every count once and in order, and no boot that nobody asked for.
    fn read_guests(&mut self) {
        let uids: Vec<_> = self.books.borrow().subjects.keys().cloned().collect();
        for uid in uids {
            let guest = self.guests.entry(uid.clone()).or_default();
            let since = guest.read.replace(Instant::now());
            guest.read(&self.lab, &uid);
            let due = self
                .books
                .borrow()
                .subjects
                .get(&uid)
                .is_some_and(|subject| subject.boots_due > 0);
            for found in guest.tale.read_on(due) {
                note(&mut self.books.borrow_mut(), &uid, found, since);
            }
        }
    }

    /// A VM that was acknowledged is there until its deletion is asked for, and its numbers only rise.
    async fn listen_to_the_api(&mut self) {
        let asked = Instant::now();
        let Ok(Ok(vms)) = timeout(Duration::from_secs(5), words::vms(&self.lab)).await else {
            return;
        };
        let mut books = self.books.borrow_mut();
        let listed: BTreeSet<_> = vms.values().map(|vm| vm.uid.clone()).collect();
        let lost: Vec<_> = books
            .subjects
            .iter()
            .filter(|(uid, subject)| {
                let old = subject.settled.is_some_and(|since| since < asked);
                old && subject.acknowledged && subject.want != Want::Gone && !listed.contains(*uid)
            })
            .map(|(uid, subject)| format!("{} ({uid})", subject.name))
            .collect();
        books.checked("acknowledged VMs are listed");
        for vm in lost {
            books.violation("nothing acknowledged is lost", format!("{vm} is not listed"));
        }
        for vm in vms.values() {
            let told = (
                words::number_at(&vm.all, "/status/epoch"),
                words::number_at(&vm.all, "/generation"),
            );
            books.checked("epochs and generations only rise");
            let before = self.numbers.insert(vm.uid.clone(), told).unwrap_or_default();
            if told.0 < before.0 || told.1 < before.1 {
                let evidence = format!("{}: epoch and generation {before:?}, then {told:?}", vm.name);
                books.violation("epochs and generations only rise", evidence);
            }
        }
    }
}

/// How people know a VM.
fn name_of(books: &Books, uid: &str) -> String {
    books.subjects.get(uid).map_or_else(
        || uid.to_owned(),
        |subject| format!("{} ({})", subject.name, &uid[..8.min(uid.len())]),
    )
}

/// `since` is when was listened before: what was found was said after that.
fn note(books: &mut Books, uid: &str, found: Found, since: Option<Instant>) {
    let name = name_of(books, uid);
    let Some(subject) = books.subjects.get_mut(uid) else {
        return;
    };
    match found {
        Found::Break(text) => books.violation("every count once and in order", format!("{name}: {text}")),
        Found::Boot => {
            let due = subject.boots_due;
            subject.boots_due = due.saturating_sub(1);
            // Else it may be the boot of before its death, read after it.
            if subject.victim < since {
                subject.victim = None;
            }
            books.checked("a boot was asked for");
            books.tell(&format!("eye: {name} boots"));
            if due == 0 {
                books.violation("no guest boots that nobody asked to", name);
            }
        }
        Found::Tick(count) => {
            let frozen = subject.want == Want::Paused
                && subject
                    .settled
                    .zip(since)
                    .is_some_and(|(settled, since)| since > settled + SETTLE);
            if subject.victim.is_some_and(|since| since.elapsed() > SURVIVED) {
                subject.victim = None;
            }
            books.checked("counts of guests");
            if frozen {
                books.violation("a paused guest does not count on", format!("{name}: {count}"));
            }
        }
    }
}

impl Guest {
    /// Reads on in the files that are open, and opens those that are new. Open ones stay readable when their host has
    /// removed them.
    fn read(&mut self, lab: &Lab, uid: &str) {
        for host in lab.hosts() {
            let Ok(file) = File::open(story::file(lab, host.number, uid)) else {
                continue;
            };
            let Ok(meta) = file.metadata() else { continue };
            let identity = (meta.dev(), meta.ino());
            if self.pages.iter().all(|(_, known, _)| *known != identity) {
                self.tale.open(format!("{}'s log {}", host.name, meta.ino()));
                self.pages.push((file, identity, 0));
            }
        }
        for (number, (file, _, at)) in self.pages.iter_mut().enumerate() {
            let mut said = Vec::new();
            if file.seek(SeekFrom::Start(*at)).is_ok()
                && let Ok(more) = file.read_to_end(&mut said)
            {
                *at += more as u64;
                self.tale.hear(number, &said);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::books::Subject;

    #[test]
    fn only_disks_that_libvirt_gives_back_by_itself_are_told_apart() {
        let told_apart = [
            r#"h1-libvirtd.log: error : unable to execute QEMU command 'blockdev-set-active': Failed to get "write" lock"#,
            r#"h1-libvirtd.log: error : unable to execute QEMU command 'cont': Failed to get "write" lock"#,
            r#"busy.log: Failed to get "write" lock"#,
            r#"h1-agent.log: 2026 WARN vm{vm=u}: dalgu_agent::vm::steps: step failed step=Resume error=resume: internal error: unable to execute QEMU command 'cont': Failed to get "write" lock (libvirt code 1) tries=1 retrying=true"#,
        ];
        for line in told_apart {
            assert!(gives_back(line), "{line}");
        }
        let counted = [
            r#"h1-agent.log: WARN error="unable to execute QEMU command 'cont': Failed to get \"write\" lock""#,
            r#"h1-agent.log: WARN step failed step=Start error=start: unable to execute QEMU command 'cont': Failed to get "write" lock"#,
            r#"h1-libvirtd.log: error : unable to execute QEMU command 'blockdev-add': Failed to get "write" lock"#,
            r#"busy.log: qemu-system-x86_64: -blockdev {}: Failed to get "write" lock"#,
        ];
        for line in counted {
            assert!(!gives_back(line), "{line}");
        }
    }

    #[tokio::test]
    async fn a_boot_of_before_the_guests_death_that_is_read_after_it_does_not_bring_it_back() {
        let mut books = Books::default();
        books.subjects.insert("u".to_owned(), Subject::example());
        let before = Instant::now();
        books.killed("u");
        let death = books.subjects["u"].victim.unwrap();
        note(&mut books, "u", Found::Boot, Some(before));
        assert!(books.subjects["u"].victim.is_some(), "it may have been before");
        let after = death + Duration::from_millis(1);
        note(&mut books, "u", Found::Boot, Some(after));
        assert!(books.subjects["u"].victim.is_none(), "it is started again");
    }
}
