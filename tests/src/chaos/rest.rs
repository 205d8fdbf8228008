//! The end of a chaos run: nothing is broken any more, nobody asks for anything. Within a limit every operation has ended
//! and every view agrees; guests that should run count on; then all VMs are deleted and nothing of them is left.
//! Called by [`super::run`], with the eye still open.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::bail;
use dalgu_proto::v1;
use tokio::time::{Instant, sleep, timeout};

use super::books::{Books, Want};
use super::clients::answer;
use super::eye::processes::scan;
use crate::e2e::census::at_rest;
use crate::e2e::story::Story;
use crate::e2e::words;
use crate::lab::Lab;
use crate::operator::Operator;

/// From the last healing until all agrees.
pub const REST_LIMIT: Duration = Duration::from_secs(120);

/// A hung QEMU is not waited for longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Looks at what a processor does, and the time between two.
const LOOKS: u32 = 10;
const LOOK: Duration = Duration::from_millis(200);
/// A guest that was brought back has counted by then.
const COUNTS_AGAIN: Duration = Duration::from_secs(80);

/// Figures of the end.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Rest {
    /// Seconds until all agreed; the limit if it never did.
    pub seconds: f64,
    /// VMs that were there then.
    pub vms: usize,
}

/// Waits for rest and checks it; whatever is wrong is a violation in the books.
///
/// # Errors
/// If the controller gives no answer.
pub async fn come_to_rest(
    lab: &Lab,
    operator: &Operator,
    books: &Rc<RefCell<Books>>,
) -> anyhow::Result<Rest> {
    let began = Instant::now();
    books.borrow_mut().tell("all is healed; waiting for rest");
    agree(lab, books, "all views agree at rest").await;
    let rest = began.elapsed();
    books
        .borrow_mut()
        .tell(&format!("at rest after {:.1} s", rest.as_secs_f64()));
    every_operation_ended(operator, books).await?;
    let vms = words::vms(lab).await?;
    for vm in vms.values() {
        let wanted = check_state(lab, books, vm);
        if wanted {
            counts_on(lab, operator, books, vm).await?;
        }
    }
    let count = vms.len();
    for name in vms.into_keys() {
        delete(operator, books, &name).await?;
    }
    agree(lab, books, "nothing is left of deleted VMs").await;
    let left = scan(&lab.hosts());
    books.borrow_mut().checked("no QEMU is left");
    if !left.is_empty() {
        books
            .borrow_mut()
            .violation("no QEMU is left", format!("{left:?}"));
    }
    Ok(Rest {
        seconds: rest.as_secs_f64(),
        vms: count,
    })
}

async fn agree(lab: &Lab, books: &Rc<RefCell<Books>>, rule: &str) {
    books.borrow_mut().checked(rule);
    if let Err(error) = at_rest(lab, &[], REST_LIMIT).await {
        books.borrow_mut().violation(rule, format!("{error:#}"));
    }
}

async fn every_operation_ended(operator: &Operator, books: &Rc<RefCell<Books>>) -> anyhow::Result<()> {
    let open = books.borrow().open.clone();
    for (id, what) in open {
        let asked = answer(async || {
            let request = v1::GetOperationRequest { id: id.clone() };
            operator.operations().get_operation(request).await
        })
        .await?;
        let ended = asked.as_ref().is_ok_and(|operation| operation.end_time.is_some());
        let mut books = books.borrow_mut();
        books.checked("every operation ends");
        if !ended {
            books.violation("every operation ends", format!("{what} ({id}): {asked:?}"));
        }
    }
    Ok(())
}

/// Whether the VM is as was asked for last; answers whether it should run.
fn check_state(lab: &Lab, books: &Rc<RefCell<Books>>, vm: &words::Vm) -> bool {
    let mut books = books.borrow_mut();
    let Some(subject) = books.subjects.get(&vm.uid).cloned() else {
        books.violation("no VM that nobody created", vm.all.to_string());
        return false;
    };
    books.checked("each VM is as was asked for last");
    let runs = scan(&lab.hosts()).iter().any(|process| process.uid == vm.uid);
    let as_wanted = match subject.want {
        Want::Running => runs || (subject.victim.is_some() && !subject.restarts),
        Want::Off => !runs,
        // One whose QEMU died while it was frozen stays off.
        Want::Paused => runs || subject.victim.is_some(),
        Want::Gone => false,
    };
    // What was refused or failed binds nobody.
    if !as_wanted && subject.settled.is_some() {
        let evidence = format!(
            "{}: {:?} was asked for and done; it is {}",
            vm.name, subject.want, vm.all["status"]
        );
        books.violation("each VM is as was asked for last", evidence);
    }
    subject.want == Want::Running && runs
}

/// A guest that runs counts on. One that QEMU froze because its disk was full is let go on by its operator.
async fn counts_on(
    lab: &Lab,
    operator: &Operator,
    books: &Rc<RefCell<Books>>,
    vm: &words::Vm,
) -> anyhow::Result<()> {
    if vm.state == "PAUSED" {
        let why = vm.all["status"]["powerReason"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        books.borrow_mut().tell(&format!("{} is paused: {why}", vm.name));
        if why != "POWER_REASON_IO_ERROR" {
            let evidence = format!("{} is paused: {why}", vm.name);
            books
                .borrow_mut()
                .violation("each VM is as was asked for last", evidence);
        }
        let resumed = answer(async || {
            let request = v1::ResumeVmRequest {
                name: vm.name.clone(),
                ..v1::ResumeVmRequest::default()
            };
            operator.vms().resume_vm(request).await
        })
        .await?;
        if let Ok(operation) = resumed
            && let Err(error) = operator.finish(operation).await
        {
            books.borrow_mut().violation(
                "a VM frozen by a full disk can go on",
                format!("{}: {error:#}", vm.name),
            );
        }
    }
    books.borrow_mut().checked("a running guest counts on");
    let mut story = Story::default();
    let heard = match story.read_on(lab, vm) {
        Ok(()) => story.more(lab, vm, 5).await,
        Err(error) => Err(error),
    };
    let Err(error) = heard else {
        return Ok(());
    };
    let before = of_qemu(lab, vm).await;
    books
        .borrow_mut()
        .tell(&format!("{}: {error:#}\n{before}", vm.name));
    let (tried, heard) = if has_missed_one(lab, vm).await {
        let heard = match nudged(lab, vm, &mut story).await {
            Err(_) => frozen_and_thawed(operator, vm, &mut story, lab).await,
            heard => heard,
        };
        (
            "an emulated processor had missed a timer interrupt, and went on at the next one",
            heard,
        )
    } else if always(lab, vm, "HLT=0").await {
        let rule =
            "an emulated guest's kernel had lost itself for want of processor time, and counts after a reset";
        (rule, anew(operator, books, vm, &mut story, lab).await)
    } else {
        ("its processor sleeps and wakes", Err(error))
    };
    let Err(error) = heard else {
        books.borrow_mut().checked(tried);
        return Ok(());
    };
    // All of it on one line: the tale of a violation is made of lines.
    let after = of_qemu(lab, vm).await;
    let evidence = format!(
        "{}: {tried}: {error:#}; before: {before}; after: {after}",
        vm.name
    );
    books
        .borrow_mut()
        .violation("a running guest counts on", evidence.replace(['\r', '\n'], " "));
    Ok(())
}

/// A key is pressed. QEMU's emulated processor can lose the interrupt that it was to wake at, as it is stopped just then to be migrated; any
/// other one brings it back.
async fn nudged(lab: &Lab, vm: &words::Vm, story: &mut Story) -> anyhow::Result<()> {
    lab.virsh(vm.host_number()?, &["send-key", &vm.uid, "KEY_LEFTSHIFT"])
        .await?;
    counts_again(story, lab, vm).await
}

/// The VM is paused and goes on, by its operator: QEMU wakes the processor's thread anew.
async fn frozen_and_thawed(
    operator: &Operator,
    vm: &words::Vm,
    story: &mut Story,
    lab: &Lab,
) -> anyhow::Result<()> {
    let name = &vm.name;
    let request = v1::PauseVmRequest {
        name: name.clone(),
        ..v1::PauseVmRequest::default()
    };
    let paused = operator.vms().pause_vm(request).await?.into_inner();
    operator.finish(paused).await?;
    let request = v1::ResumeVmRequest {
        name: name.clone(),
        ..v1::ResumeVmRequest::default()
    };
    let resumed = operator.vms().resume_vm(request).await?.into_inner();
    operator.finish(resumed).await?;
    counts_again(story, lab, vm).await
}

async fn counts_again(story: &mut Story, lab: &Lab, vm: &words::Vm) -> anyhow::Result<()> {
    match timeout(COUNTS_AGAIN, story.more(lab, vm, 5)).await {
        Ok(heard) => heard,
        Err(_) => bail!("no count for {} s", COUNTS_AGAIN.as_secs()),
    }
}

/// Whether the emulated processor sleeps although an interrupt waits for it, which no processor does.
async fn has_missed_one(lab: &Lab, vm: &words::Vm) -> bool {
    let Ok(host) = vm.host_number() else {
        return false;
    };
    let question = ["qemu-monitor-command", &vm.uid, "--hmp", "info lapic"];
    let waits = match timeout(ANSWER_LIMIT, lab.virsh(host, &question)).await {
        Ok(Ok(lapic)) => lapic
            .lines()
            .any(|line| line.starts_with("IRR") && !line.contains("(none)")),
        _ => false,
    };
    waits && always(lab, vm, "HLT=1").await
}

/// Whether the emulated processor is so at every look: HLT=1 where it sleeps, HLT=0 where it executes. A machine that has not the time for
/// all of its guests lets a kernel do nothing but serve its timer.
async fn always(lab: &Lab, vm: &words::Vm, state: &str) -> bool {
    let Ok(host) = vm.host_number() else {
        return false;
    };
    for _ in 0..LOOKS {
        let question = ["qemu-monitor-command", &vm.uid, "--hmp", "info registers"];
        match timeout(ANSWER_LIMIT, lab.virsh(host, &question)).await {
            Ok(Ok(registers)) if registers.contains(state) => sleep(LOOK).await,
            _ => return false,
        }
    }
    true
}

/// The guest is reset, and counts from its boot on.
async fn anew(
    operator: &Operator,
    books: &Rc<RefCell<Books>>,
    vm: &words::Vm,
    story: &mut Story,
    lab: &Lab,
) -> anyhow::Result<()> {
    if let Some(subject) = books.borrow_mut().named(&vm.name) {
        subject.boots_due += 1;
    }
    let request = v1::RestartVmRequest {
        name: vm.name.clone(),
        mode: v1::RestartMode::Reset.into(),
        ..v1::RestartVmRequest::default()
    };
    let reset = operator.vms().restart_vm(request).await?.into_inner();
    operator.finish(reset).await?;
    counts_again(story, lab, vm).await
}

/// What libvirt and QEMU say of a guest, for a person who looks for the cause.
async fn of_qemu(lab: &Lab, vm: &words::Vm) -> String {
    let Ok(host) = vm.host_number() else {
        return String::new();
    };
    let mut seen = String::new();
    let uid = vm.uid.as_str();
    for question in [
        &["domstate", uid, "--reason"][..],
        &["qemu-monitor-command", uid, "--hmp", "info status"],
        &["qemu-monitor-command", uid, "--hmp", "info registers"],
        &["qemu-monitor-command", uid, "--hmp", "info lapic"],
        &["qemu-monitor-command", uid, "--hmp", "info pic"],
        &["qemu-monitor-command", uid, "--hmp", "info chardev"],
        &["qemu-monitor-command", uid, "--hmp", "info registers"],
    ] {
        let answer = timeout(ANSWER_LIMIT, lab.virsh(host, question)).await;
        seen += &format!("{}: {answer:?}\n", question.join(" "));
    }
    seen
}

async fn delete(operator: &Operator, books: &Rc<RefCell<Books>>, name: &str) -> anyhow::Result<()> {
    if let Some(subject) = books.borrow_mut().named(name) {
        subject.want = Want::Gone;
        subject.settled = None;
    }
    let deleted = answer(async || {
        let request = v1::DeleteVmRequest {
            name: name.to_owned(),
            force: true,
            ..v1::DeleteVmRequest::default()
        };
        operator.vms().delete_vm(request).await
    })
    .await?;
    let outcome = match deleted {
        Ok(operation) => operator.finish(operation).await.map(drop),
        Err(status) => Err(status.into()),
    };
    if let Err(error) = outcome {
        books
            .borrow_mut()
            .violation("every VM can be deleted at rest", format!("{name}: {error:#}"));
    }
    Ok(())
}
