//! `dalgu events` and `dalgu vm events`.

use dalgu_proto::{reason, v1};
use tonic::Code;

use super::{common::Controller, event};

#[tokio::test]
async fn events_are_listed_oldest_first_and_followed_from_the_newest() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let events = vec![event(8, "web", None).unwrap(), event(5, "web", None).unwrap()];
        script.events.push_back(Ok(v1::ListEventsResponse {
            events,
            next_page_token: String::new(),
        }));
        let end = reason::status(Code::PermissionDenied, "NOT_ALLOWED", "enough");
        script
            .streams
            .push_back(Ok(vec![event(9, "web", None), Err(end)]));
    }
    let outcome = controller
        .run(&["vm", "events", "web", "--follow", "-o", "json"])
        .await;
    let versions: Vec<_> = outcome
        .out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["resourceVersion"].clone())
        .collect();
    assert_eq!(versions, ["5", "8", "9"]);
    assert_eq!(controller.fake.script().seen, [r#"watch_events 8 "web""#]);
}
