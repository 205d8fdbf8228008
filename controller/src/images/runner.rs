//! Looks at the images again and again: stores what hosts have done, and tells hosts what is to be done.
//!
//! A task of the controller. One command at a time to each host, each with a deadline, and a pause after one that was not
//! carried out; a command that is lost is given again, since [`plan`] reads from the state what is missing. Only hosts that
//! are heard from are told anything, and nobody while the controller only observes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use dalgu_proto::ids::{HostName, ImageId};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::plan::{self, Change, Step};
use crate::{
    agent_client::{self, Agents},
    model::{Held, HeldImage, ImageRecord, ImageState},
    state::{Db, State, Tx},
};

/// Least time between two looks: what changes together, as when all hosts come back, is looked at together.
const PAUSE: Duration = Duration::from_millis(100);
/// After so long all is looked at although nothing has changed, for commands that want to be tried again.
const RESYNC: Duration = Duration::from_secs(1);
/// After so long it is looked at in any case: what is left over goes by its age.
const AGES: Duration = Duration::from_mins(1);
/// The same command is given again after this at the earliest; the pause doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Commands under way at once; the deletion of an image is told to every host.
const AT_ONCE: usize = 64;
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// The agents.
    pub agents: Arc<Agents>,
}

/// When a command may be given again.
struct Pause {
    until: Instant,
    length: Duration,
}

type Answer = Result<Option<HeldImage>, agent_client::Error>;

impl Runner {
    /// Runs until `stop`. Commands under way are given up then: they are given again at the next start.
    pub async fn run(self, stop: CancellationToken) {
        let mut changes = self.db.image_changes();
        changes.mark_changed();
        let mut calls: JoinSet<(Step, Option<Held>, Answer)> = JoinSet::new();
        let mut busy = BTreeSet::<HostName>::new();
        let mut pauses = BTreeMap::<Step, Pause>::new();
        let mut next = Instant::now();
        loop {
            // Cancel safe: an answer is taken whole or stays in the set; a change that was not looked at is still one.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(ended) = calls.join_next(), if !calls.is_empty() => {
                    let (step, before, answer) = match ended {
                        Ok(ended) => ended,
                        Err(error) => std::panic::resume_unwind(error.into_panic()),
                    };
                    busy.remove(step.host());
                    self.ended(step, before, answer, &mut pauses).await;
                    continue;
                }
                going_on = due(&mut changes, next, !pauses.is_empty()) => if !going_on {
                    break;
                },
            }
            next = Instant::now() + PAUSE;
            let state = self.db.snapshot();
            // After a restore nobody is commanded before an operator has looked at what hosts have; nor when agents obey
            // another controller.
            if state.meta.observing.is_some() || state.replaced_by.is_some() {
                continue;
            }
            let state = self.store(state).await;
            let steps = plan::steps(&state, self.db.now());
            let now = Instant::now();
            let planned: BTreeSet<_> = steps.iter().collect();
            pauses.retain(|step, pause| pause.until + pause.length > now || planned.contains(step));
            for step in steps {
                let paused = pauses.get(&step).is_some_and(|pause| pause.until > now);
                if paused || busy.contains(step.host()) || busy.len() >= AT_ONCE {
                    // Looked at again when that host has answered, which changes the number, or after the pause.
                    continue;
                }
                busy.insert(step.host().clone());
                let (agents, state) = (self.agents.clone(), state.clone());
                calls.spawn(async move {
                    let before = there(&state, &step);
                    let answer = carry_out(&agents, &state, &step).await;
                    (step, before, answer)
                });
            }
        }
        calls.shutdown().await;
    }

    /// Stores what hosts have done.
    async fn store(&self, state: Arc<State>) -> Arc<State> {
        if plan::changes(&state, self.db.now()).is_empty() {
            return state;
        }
        self.db
            .change(|tx| {
                for change in plan::changes(tx, tx.now()) {
                    apply(tx, change);
                }
            })
            .await;
        self.db.snapshot()
    }

    async fn ended(
        &self,
        step: Step,
        before: Option<Held>,
        answer: Answer,
        pauses: &mut BTreeMap<Step, Pause>,
    ) {
        let length = pauses.get(&step).map_or(FIRST_PAUSE, |pause| pause.length * 2);
        let length = length.min(MAX_PAUSE);
        match answer {
            Ok(held) => self.db.change(|tx| note(tx, &step, before.as_ref(), held)).await,
            Err(error) => {
                tracing::warn!(%error, again_in_ms = length.as_millis(), "a command about an image was not carried out");
                self.db.change(|tx| not_done(tx, &step, &error)).await;
            }
        }
        let until = Instant::now() + length;
        pauses.insert(step, Pause { until, length });
    }
}

/// Waits for a change, no longer than [`AGES`], or, where commands want to be tried again, [`RESYNC`]; not before `from`. Whether
/// the state still changes: it does not when its store has failed.
async fn due(changes: &mut watch::Receiver<u64>, from: Instant, again: bool) -> bool {
    tokio::time::sleep_until(from).await;
    let wait = if again { RESYNC } else { AGES };
    let changed = tokio::time::timeout(wait, changes.changed()).await;
    !matches!(changed, Ok(Err(_)))
}

fn not_done(tx: &mut Tx, step: &Step, error: &agent_client::Error) {
    if let Some(by) = error.replaced() {
        tx.set_replaced(by);
    }
    if let (Step::Import { image, .. }, Some(fault)) = (step, error.refusal()) {
        apply(tx, Change::Failed(*image, fault));
    }
    // Another step for that host may have waited.
    tx.touch_images();
}

async fn carry_out(agents: &Agents, state: &State, step: &Step) -> Answer {
    match step {
        Step::Import { image, host } => match state.images.get(image) {
            Some(image) => agents.import_image(state, host, image).await.map(Some),
            None => Ok(None),
        },
        Step::Fetch { digest, host } => agents.fetch_image(state, host, digest).await.map(Some),
        Step::Remove { host, digest, image } => {
            match agents.remove_image(state, host, digest.as_ref(), *image).await {
                // Of before there were images.
                Err(error) if error.is_unknown_command() => Ok(None),
                outcome => outcome,
            }
        }
    }
}

/// What its host has said of what a step is about.
fn there(state: &State, step: &Step) -> Option<Held> {
    let stock = state.live.get(step.host())?.images.as_ref()?;
    match step {
        Step::Import { image, .. } => stock.imports.get(image).map(|held| (**held).clone()),
        Step::Fetch { digest, .. } => stock.copies.get(digest).map(|held| (**held).clone()),
        Step::Remove { .. } => None,
    }
}

/// Takes note of an answer. A report that came while it was waited for is newer: who has been told of an end does not tell it again.
fn note(tx: &mut Tx, step: &Step, before: Option<&Held>, held: Option<HeldImage>) {
    let left = held.clone().filter(|_| matches!(step, Step::Remove { .. }));
    if let Some(held) = held
        && there(tx, step).as_ref() == before
    {
        tx.note_held(step.host(), held);
    }
    if let Step::Remove { host, digest, image } = step {
        match left {
            None => tx.note_removed(host, digest.as_ref(), *image),
            Some(held) => learn(tx, held),
        }
    }
}

/// An import ended in the moment in which its image was deleted: its copy goes too, everywhere.
fn learn(tx: &mut Tx, held: HeldImage) {
    let HeldImage::Import(
        id,
        Held {
            content: Some(content),
            ..
        },
    ) = held
    else {
        return;
    };
    if let Some(mut image) = find(tx, id, &[ImageState::Deleting]) {
        image.content = Some(content);
        tx.put_image(image);
    }
}

/// An image that is in one of these states.
fn find(tx: &Tx, id: ImageId, states: &[ImageState]) -> Option<ImageRecord> {
    let image = tx.images.get(&id)?;
    states.contains(&image.state).then(|| (**image).clone())
}

/// Stores one change and tells of it, unless it has been overtaken.
fn apply(tx: &mut Tx, change: Change) {
    match change {
        Change::Received(id) => received(tx, id),
        Change::Imported {
            image,
            content,
            sha256,
            bytes,
        } => {
            let Some(mut image) = find(tx, image, &[ImageState::Importing]) else {
                return;
            };
            image.state = ImageState::Available;
            image.sha256 = image.sha256.or(sha256);
            if image.size_bytes == 0 {
                image.size_bytes = bytes;
            }
            image.content = Some(content);
            tx.image_event(
                &image,
                "ImageAvailable",
                "verified and converted; VMs can be made from it",
            );
            tx.put_image(image);
        }
        Change::Failed(id, fault) => {
            let Some(mut image) = find(tx, id, &[ImageState::AwaitingUpload, ImageState::Importing]) else {
                return;
            };
            let message = format!("{}: {}", fault.reason, fault.message);
            tx.image_event(&image, "ImageFailed", message);
            image.state = ImageState::Failed;
            image.error = Some(fault);
            tx.put_image(image);
        }
        Change::Gone(id) => {
            if let Some(image) = find(tx, id, &[ImageState::Deleting]) {
                tx.image_event(&image, "ImageDeleted", "no host has anything of it");
                tx.delete_image(id);
            }
        }
    }
}

/// All bytes of an upload have come.
pub fn received(tx: &mut Tx, id: ImageId) {
    if let Some(mut image) = find(tx, id, &[ImageState::AwaitingUpload]) {
        image.state = ImageState::Importing;
        tx.image_event(&image, "ImageUploaded", "all its bytes have come");
        tx.put_image(image);
    }
}
