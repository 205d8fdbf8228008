//! The operators of a chaos run: one for each VM name, who creates, moves, stops, starts, pauses, restarts and deletes
//! it, cancels now and then, and sends a request again when there was no answer; and one who cordons hosts. Each writes
//! into the books what may be expected before it asks, and what was answered. Run by [`super::run`].

mod cordon;
mod request;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use dalgu_proto::v1::{self, OperationState};
use tokio::time::{Instant, sleep};
use tonic::Status;

pub use self::cordon::cordon;
pub use self::request::answer;
use self::request::{Request, has_ended, reason};
use super::books::{Books, Subject, Want, count};
use super::random::Random;
use crate::operator::{Operator, small_vm};

/// An operation that has not ended by then is left to the end of the run, when it must have.
const OPERATION_LIMIT: Duration = Duration::from_mins(2);

/// What an operator does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Create,
    Migrate,
    MigrateAndCancel,
    CreateAndCancel,
    Start,
    Stop,
    PowerOff,
    Pause,
    Resume,
    Reboot,
    Reset,
    Delete,
}

const RUNNING: [(u64, Verb); 8] = [
    (58, Verb::Migrate),
    (9, Verb::MigrateAndCancel),
    (6, Verb::Stop),
    (4, Verb::PowerOff),
    (7, Verb::Pause),
    (4, Verb::Reboot),
    (4, Verb::Reset),
    (4, Verb::Delete),
];
const OFF: [(u64, Verb); 2] = [(85, Verb::Start), (15, Verb::Delete)];
const PAUSED: [(u64, Verb); 3] = [(85, Verb::Resume), (10, Verb::PowerOff), (5, Verb::Delete)];
const GONE: [(u64, Verb); 2] = [(85, Verb::Create), (15, Verb::CreateAndCancel)];
/// After something failed: ask for what should be.
const UNCLEAR: [(u64, Verb); 4] = [
    (60, Verb::Start),
    (15, Verb::PowerOff),
    (15, Verb::Migrate),
    (10, Verb::Delete),
];

/// One operator with one VM.
pub struct Client {
    operator: Operator,
    books: Rc<RefCell<Books>>,
    random: Random,
    name: String,
    hosts: Vec<String>,
    /// Pauses between two requests, in ms.
    pause: (u64, u64),
}

impl Client {
    /// An operator of the VM of that name.
    #[must_use]
    pub fn new(
        operator: &Operator,
        books: Rc<RefCell<Books>>,
        random: Random,
        name: String,
        hosts: Vec<String>,
        pause: (u64, u64),
    ) -> Self {
        Self {
            operator: operator.clone(),
            books,
            random,
            name,
            hosts,
            pause,
        }
    }

    /// Asks for one thing after the other until the time is over.
    ///
    /// # Errors
    /// If the controller does not answer at all.
    pub async fn run(mut self, until: Instant) -> anyhow::Result<()> {
        while Instant::now() < until {
            let verb = self.next();
            if let Some(verb) = verb {
                self.carry_out(verb).await?;
            }
            sleep(self.random.millis(self.pause.0, self.pause.1)).await;
        }
        Ok(())
    }

    fn next(&mut self) -> Option<Verb> {
        let (want, settled) = match self.books.borrow_mut().named(&self.name) {
            None => (Want::Gone, true),
            Some(subject) => (subject.want, subject.settled.is_some()),
        };
        match (want, settled) {
            (Want::Gone, _) => self.random.weighed(&GONE),
            (_, false) => self.random.weighed(&UNCLEAR),
            (Want::Running, _) => self.random.weighed(&RUNNING),
            (Want::Off, _) => self.random.weighed(&OFF),
            (Want::Paused, _) => self.random.weighed(&PAUSED),
        }
    }

    async fn carry_out(&mut self, verb: Verb) -> anyhow::Result<()> {
        let id = self.random.uuid();
        let request = self.request(verb, &id);
        self.expect(verb);
        let label = format!("{verb:?}");
        self.books.borrow_mut().tell(&format!("{}: {label}", self.name));
        let operation = match request.send(&self.operator).await? {
            Ok(operation) => operation,
            Err(status) => {
                let mut books = self.books.borrow_mut();
                books.tell(&format!(
                    "{}: {label} refused: {} {}",
                    self.name,
                    status.code(),
                    status.message()
                ));
                count(&mut books.refusals, &format!("{label}: {}", reason(&status)));
                drop(books);
                self.refused(verb, &status);
                return Ok(());
            }
        };
        self.acknowledged(verb, &request, &operation);
        if self.random.percent(12) {
            self.ask_again(&request, &operation).await?;
        }
        if matches!(verb, Verb::MigrateAndCancel | Verb::CreateAndCancel) {
            sleep(self.random.millis(0, 2500)).await;
            self.cancel(&operation.id).await?;
        }
        self.await_end(verb, &label, operation).await
    }

    fn request(&mut self, verb: Verb, id: &str) -> Request {
        let (name, request_id, etag) = (self.name.clone(), id.to_owned(), String::new());
        match verb {
            Verb::Create | Verb::CreateAndCancel => {
                let pool = if self.random.percent(50) {
                    "local"
                } else {
                    "shared"
                };
                let mut vm = small_vm(&name, pool);
                if let Some(spec) = &mut vm.spec {
                    let policy = self.random.weighed(&[
                        (7, v1::RestartPolicy::OnFailure),
                        (2, v1::RestartPolicy::Always),
                        (1, v1::RestartPolicy::Never),
                    ]);
                    spec.restart_policy = policy.unwrap_or(v1::RestartPolicy::OnFailure).into();
                }
                Request::Create(v1::CreateVmRequest {
                    vm: Some(vm),
                    request_id,
                    ..v1::CreateVmRequest::default()
                })
            }
            Verb::Migrate | Verb::MigrateAndCancel => {
                let destination_host = if self.random.percent(70) {
                    self.random.pick(&self.hosts).cloned().unwrap_or_default()
                } else {
                    String::new()
                };
                let slow = if verb == Verb::Migrate { 35 } else { 90 };
                Request::Migrate(v1::MigrateVmRequest {
                    name,
                    request_id,
                    destination_host,
                    bandwidth_mib_per_second: if self.random.percent(slow) {
                        u32::try_from(self.random.between(8, 32)).unwrap_or(8)
                    } else {
                        0
                    },
                    ..v1::MigrateVmRequest::default()
                })
            }
            Verb::Start => Request::Start(v1::StartVmRequest {
                name,
                etag,
                request_id,
            }),
            Verb::Stop | Verb::PowerOff => Request::Stop(v1::StopVmRequest {
                name,
                etag,
                request_id,
                grace_period_seconds: if verb == Verb::Stop { 15 } else { 0 },
                force: verb == Verb::PowerOff,
            }),
            Verb::Pause => Request::Pause(v1::PauseVmRequest {
                name,
                etag,
                request_id,
            }),
            Verb::Resume => Request::Resume(v1::ResumeVmRequest {
                name,
                etag,
                request_id,
            }),
            Verb::Reboot | Verb::Reset => {
                let mode = if verb == Verb::Reset {
                    v1::RestartMode::Reset
                } else {
                    v1::RestartMode::Reboot
                };
                Request::Restart(v1::RestartVmRequest {
                    name,
                    etag,
                    request_id,
                    mode: mode.into(),
                })
            }
            Verb::Delete => Request::Delete(v1::DeleteVmRequest {
                name,
                etag,
                request_id,
                force: true,
            }),
        }
    }

    /// Writes down, before it is asked, what may happen from now on.
    fn expect(&self, verb: Verb) {
        let mut books = self.books.borrow_mut();
        let Some(subject) = books.named(&self.name) else {
            return;
        };
        let (want, boots) = match verb {
            // Wherever it then is, it runs all the time.
            Verb::Migrate | Verb::MigrateAndCancel | Verb::Create | Verb::CreateAndCancel => return,
            Verb::Start => (Want::Running, 1),
            Verb::Resume => (Want::Running, 0),
            Verb::Stop | Verb::PowerOff => (Want::Off, 0),
            Verb::Pause => (Want::Paused, 0),
            // A guest that does not reboot is asked once more.
            Verb::Reboot => (Want::Running, 2),
            Verb::Reset => (Want::Running, 1),
            Verb::Delete => (Want::Gone, 0),
        };
        subject.want = want;
        subject.settled = None;
        subject.boots_due += boots;
    }

    /// A refused request changes nothing; what the state is shows the next answer.
    fn refused(&self, verb: Verb, status: &Status) {
        let mut books = self.books.borrow_mut();
        let gone = reason(status) == "VM_NOT_FOUND";
        let name = self.name.clone();
        let Some(subject) = books.named(&name) else {
            return;
        };
        if gone && subject.want == Want::Gone {
            subject.settled = Some(Instant::now());
        } else if gone && subject.acknowledged {
            books.violation(
                "nothing acknowledged is lost",
                format!("{name}: {verb:?} says VM_NOT_FOUND"),
            );
        } else if verb == Verb::Delete {
            // It was not deleted.
            subject.want = Want::Off;
        }
    }

    fn acknowledged(&self, verb: Verb, request: &Request, operation: &v1::Operation) {
        let mut books = self.books.borrow_mut();
        books
            .open
            .insert(operation.id.clone(), format!("{verb:?} of {}", self.name));
        if let Request::Create(request) = request {
            let policy = request
                .vm
                .as_ref()
                .and_then(|vm| Some(vm.spec.as_ref()?.restart_policy()));
            let subject = Subject {
                name: self.name.clone(),
                want: if verb == Verb::Create {
                    Want::Running
                } else {
                    Want::Gone
                },
                settled: None,
                acknowledged: verb == Verb::Create,
                restarts: policy != Some(v1::RestartPolicy::Never),
                victim: None,
                boots_due: 1,
                deaths: Vec::new(),
            };
            books.subjects.insert(operation.vm_uid.clone(), subject);
        }
    }

    /// The same request with the same id is the same operation.
    async fn ask_again(&self, request: &Request, first: &v1::Operation) -> anyhow::Result<()> {
        let second = request.send(&self.operator).await?;
        let mut books = self.books.borrow_mut();
        books.checked("a repeated request is the same operation");
        let same = second.as_ref().is_ok_and(|second| second.id == first.id);
        if !same {
            let evidence = format!("{}: first {}, then {second:?}", self.name, first.id);
            books.violation("a repeated request is the same operation", evidence);
        }
        Ok(())
    }

    async fn cancel(&self, id: &str) -> anyhow::Result<()> {
        let cancelled = answer(async || {
            let request = v1::CancelOperationRequest { id: id.to_owned() };
            self.operator.operations().cancel_operation(request).await
        })
        .await?;
        let word = cancelled
            .err()
            .map_or_else(|| "accepted".to_owned(), |status| reason(&status));
        self.books
            .borrow_mut()
            .tell(&format!("{}: cancel {word}", self.name));
        count(
            &mut self.books.borrow_mut().operations,
            &format!("cancel: {word}"),
        );
        Ok(())
    }

    async fn await_end(&self, verb: Verb, label: &str, operation: v1::Operation) -> anyhow::Result<()> {
        let id = operation.id.clone();
        let began = Instant::now();
        let mut now = operation;
        while !has_ended(&now) {
            if began.elapsed() > OPERATION_LIMIT {
                self.books.borrow_mut().tell(&format!(
                    "{}: {label} has not ended: {}",
                    self.name, now.status_message
                ));
                count(
                    &mut self.books.borrow_mut().operations,
                    &format!("{label}: left to the end"),
                );
                return Ok(());
            }
            let asked = answer(async || {
                let request = v1::WaitOperationRequest {
                    id: id.clone(),
                    timeout: Some(prost_types::Duration { seconds: 4, nanos: 0 }),
                };
                self.operator.operations().wait_operation(request).await
            })
            .await?;
            match asked {
                Ok(operation) => now = operation,
                Err(status) => {
                    let evidence = format!("{}: {label} {id}: {status}", self.name);
                    self.books
                        .borrow_mut()
                        .violation("an acknowledged operation is kept", evidence);
                    return Ok(());
                }
            }
        }
        self.ended(verb, label, &now);
        Ok(())
    }

    fn ended(&self, verb: Verb, label: &str, operation: &v1::Operation) {
        let mut books = self.books.borrow_mut();
        books.open.remove(&operation.id);
        let state = operation.state().as_str_name().replace("OPERATION_STATE_", "");
        let error = operation.error.clone().unwrap_or_default();
        books.tell(&format!(
            "{}: {label} {state} {} {}",
            self.name, error.reason, error.message
        ));
        let why = if error.reason.is_empty() {
            String::new()
        } else {
            format!(" {}", error.reason)
        };
        count(&mut books.operations, &format!("{label}: {state}{why}"));
        let done = operation.state() == OperationState::Succeeded;
        let Some(subject) = books.subjects.get_mut(&operation.vm_uid) else {
            return;
        };
        match verb {
            Verb::Migrate | Verb::MigrateAndCancel => {}
            // Cancelled in time it is gone, and else it is there and runs.
            Verb::CreateAndCancel => {
                subject.want = if done { Want::Running } else { Want::Gone };
                subject.settled = Some(Instant::now());
            }
            _ if done => subject.settled = Some(Instant::now()),
            // What was asked for may still come to pass.
            _ => {}
        }
    }
}
