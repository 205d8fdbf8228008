//! The operator of a chaos run who cordons hosts.

use std::cell::RefCell;
use std::rc::Rc;

use dalgu_proto::v1;
use tokio::time::{Instant, sleep};

use super::super::books::{Books, count};
use super::super::random::Random;
use super::request::{answer, reason};
use crate::operator::Operator;

/// Cordons a host now and then, and uncordons it.
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
        let Some(name) = random.pick(&hosts).cloned() else {
            return Ok(());
        };
        for verb in ["cordon", "uncordon"] {
            let request_id = random.uuid();
            let done = answer(async || match verb {
                "cordon" => {
                    let request = v1::CordonHostRequest {
                        name: name.clone(),
                        reason: "chaos".to_owned(),
                        request_id: request_id.clone(),
                    };
                    operator.hosts().cordon_host(request).await
                }
                _ => {
                    let request = v1::UncordonHostRequest {
                        name: name.clone(),
                        request_id: request_id.clone(),
                    };
                    operator.hosts().uncordon_host(request).await
                }
            })
            .await?;
            {
                let mut books = books.borrow_mut();
                let outcome = done.as_ref().err().map_or_else(|| "SUCCEEDED".to_owned(), reason);
                books.tell(&format!("{verb} {name}: {outcome}"));
                count(&mut books.operations, &format!("{verb}: {outcome}"));
                if done.is_ok_and(|host| host.cordoned != (verb == "cordon")) {
                    books.violation(
                        "what was answered is so",
                        format!("{verb} of {name} is not shown"),
                    );
                }
            }
            sleep(random.millis(500, 5000)).await;
        }
    }
    Ok(())
}
