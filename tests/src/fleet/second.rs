//! Two controllers at once: a second one runs on a copy of the store, with the same credentials. Its term is that of the
//! site's controller, or a lower one. Each host's agent finds the one or the other where it looks for its controller; both
//! can reach every agent. In the end somebody stops the copy and restarts the other, as docs/operations/backup.md says.

use std::time::Duration;

use dalgu_controller::{incarnation, store::memory::Disk};

use super::{plan::Node, site::Site};

/// The site's controller, and the copy.
const ORIGINAL: Node = Node::Controller(0);
const COPY: Node = Node::Controller(1);

/// How long the original is down when it is restarted.
const RESTART: Duration = Duration::from_secs(1);

/// How often somebody looks whether the original is obeyed. Whoever was stopped had perhaps been started more often.
const LOOK: Duration = Duration::from_secs(5);

/// What hosts have left is ended by a restore when it is still there after so many looks.
const LOOKS: u32 = 6;

/// How long the restored controller waits for hosts that do not come.
const PATIENCE: Duration = Duration::from_secs(20);

impl Site {
    /// A copy is started, unless there is one.
    pub fn start_second(&self, time: Duration) {
        let Some(copied) = self.backup() else { return };
        if self.has_second() || self.life(ORIGINAL).is_none() {
            return;
        }
        let term = |image| incarnation::past(image).ok().map(|meta| meta.term);
        let (Some(theirs), Some(ours)) = (term(&copied), term(&self.image())) else {
            return;
        };
        self.fates().count(if theirs.next() < ours {
            "second controller, lower term"
        } else {
            "second controller, same term"
        });
        self.trace().say(format_args!(
            "a copy of the controller starts, of term {theirs:?}"
        ));
        self.set_second(true);
        self.put_disk(1, Disk::of(copied));
        self.start(COPY);
        if theirs == ours {
            // Both start anew, as after a power cut: they reach the same term.
            self.kill_for(ORIGINAL, RESTART);
        }
        let site = self.me();
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            site.end_second();
        });
    }

    /// Somebody stops the copy, and restarts the original until hosts obey it.
    pub fn end_second(&self) {
        if !self.has_second() {
            return;
        }
        self.trace()
            .say(format_args!("the copy is stopped, the other restarted"));
        self.set_second(false);
        self.kill_for(COPY, Duration::ZERO);
        let term = |image| incarnation::past(image).map_or(0, |meta| meta.term.0);
        // Each start raises the term by one: so often it may be told that it is refused.
        let behind = term(&self.image_of(1)).saturating_sub(term(&self.image()));
        let site = self.me();
        tokio::spawn(async move {
            // What is just starting may have been refused before it knows.
            while site.life(ORIGINAL).is_none() {
                tokio::time::sleep(RESTART).await;
            }
            site.kill_for(ORIGINAL, RESTART);
            let (number, mut refused, mut left) = (site.second_count(), 0, 0);
            loop {
                tokio::time::sleep(LOOK).await;
                if site.second_count() != number {
                    return;
                }
                if site.is_replaced() {
                    refused += 1;
                    site.checker().refused_again(refused, behind);
                    site.kill_for(ORIGINAL, RESTART);
                }
                // A restored controller ends what the copy had begun.
                left = if site.has_left() { left + 1 } else { 0 };
                if left == LOOKS {
                    site.back_up();
                    site.restore(RESTART, PATIENCE, false);
                }
            }
        });
    }

    /// A host's agent finds the other controller where it looks for its own.
    pub fn turn(&self, host: usize) {
        if self.has_second() {
            self.fates().count("agent led to the other controller");
            self.trace()
                .say(format_args!("h{} is led to the other controller", host + 1));
            self.turn_face(host);
        }
    }

    /// Whether the original has been told that hosts obey another.
    fn is_replaced(&self) -> bool {
        let services = self.services();
        services.is_some_and(|(_, services)| services.db.snapshot().replaced_by.is_some())
    }

    /// Whether nothing goes wrong any more, and hosts have what no controller knows of.
    fn has_left(&self) -> bool {
        let Some((_, services)) = self.services() else {
            return false;
        };
        let state = services.db.snapshot();
        self.fates().over && state.strays.values().any(|stray| stray.times > 1)
    }

    /// A controller is about to give a command, or hears from an agent: how long it has known that it is refused.
    pub fn knows(&self, controller: usize, command: Option<&str>) {
        let Some((_, services)) = self.services_of(controller) else {
            return;
        };
        let state = services.db.snapshot();
        let refused = state.replaced_by.is_some();
        let mut checker = self.checker();
        checker.refused(controller, state.meta.term, refused, command);
    }

    /// Where a message to the controller comes to.
    pub fn led(&self, from: Node, to: Node) -> Node {
        match (from, to) {
            (Node::Host(host), Node::Controller(_)) => Node::Controller(self.face(host)),
            _ => to,
        }
    }
}
