//! The operator of a chaos run who cordons hosts, and empties them by hand.

use std::cell::RefCell;
use std::rc::Rc;

use dalgu_proto::v1;
use tokio::time::{Instant, sleep};

use super::super::books::{Books, count};
use super::super::random::Random;
use super::request::{Request, answer, reason};
use crate::operator::Operator;

/// Cordons a host now and then, often to move away every VM that it has, and uncordons it.
///
/// # Errors
/// If the controller does not answer at all.
pub async fn cordon(
    operator: Operator,
    books: Rc<RefCell<Books>>,
    mut random: Random,
    hosts: Vec<String>,
    until: Instant,
) -> anyhow::Result<()> {
    while Instant::now() < until {
        sleep(random.millis(4000, 15_000)).await;
        let Some(name) = random.pick(&hosts) else {
            return Ok(());
        };
        close(&operator, &books, name, random.uuid()).await?;
        if random.percent(50) {
            empty(&operator, &books, &mut random, name).await?;
        }
        sleep(random.millis(500, 5000)).await;
        open(&operator, &books, name, random.uuid()).await?;
        sleep(random.millis(500, 5000)).await;
    }
    Ok(())
}

async fn close(
    operator: &Operator,
    books: &RefCell<Books>,
    name: &str,
    request_id: String,
) -> anyhow::Result<()> {
    let request = v1::CordonHostRequest {
        name: name.to_owned(),
        reason: "chaos".to_owned(),
        request_id,
    };
    let done = answer(async || operator.hosts().cordon_host(request.clone()).await).await?;
    note(&mut books.borrow_mut(), "cordon", name, done, true);
    Ok(())
}

async fn open(
    operator: &Operator,
    books: &RefCell<Books>,
    name: &str,
    request_id: String,
) -> anyhow::Result<()> {
    let request = v1::UncordonHostRequest {
        name: name.to_owned(),
        request_id,
    };
    let done = answer(async || operator.hosts().uncordon_host(request.clone()).await).await?;
    note(&mut books.borrow_mut(), "uncordon", name, done, false);
    Ok(())
}

fn note(books: &mut Books, verb: &str, name: &str, done: Result<v1::Host, tonic::Status>, cordoned: bool) {
    let outcome = done.as_ref().err().map_or_else(|| "SUCCEEDED".to_owned(), reason);
    books.tell(&format!("{verb} {name}: {outcome}"));
    count(&mut books.operations, &format!("{verb}: {outcome}"));
    if done.is_ok_and(|host| host.cordoned != cordoned) {
        books.violation(
            "what was answered is so",
            format!("{verb} of {name} is not shown"),
        );
    }
}

/// Asks to move every VM that is on the host, wherever there is room; VMs whose operators are busy with them are refused. What was
/// accepted has ended at the end of the run.
async fn empty(
    operator: &Operator,
    books: &RefCell<Books>,
    random: &mut Random,
    host: &str,
) -> anyhow::Result<()> {
    let list = v1::ListVmsRequest {
        host: host.to_owned(),
        ..v1::ListVmsRequest::default()
    };
    let listed = match answer(async || operator.vms().list_vms(list.clone()).await).await? {
        Ok(listed) => listed.vms,
        Err(status) => {
            let refused = format!("drain: list refused: {}", reason(&status));
            count(&mut books.borrow_mut().operations, &refused);
            return Ok(());
        }
    };
    for vm in listed {
        let request = Request::Migrate(v1::MigrateVmRequest {
            name: vm.name.clone(),
            request_id: random.uuid(),
            ..v1::MigrateVmRequest::default()
        });
        let sent = request.send(operator).await?;
        let mut books = books.borrow_mut();
        let outcome = match sent {
            Ok(operation) => {
                books.open.insert(operation.id, format!("Drain of {}", vm.name));
                "accepted".to_owned()
            }
            Err(status) => reason(&status),
        };
        books.tell(&format!("drain {host}: {}: {outcome}", vm.name));
        count(&mut books.operations, &format!("drain: {outcome}"));
    }
    Ok(())
}
