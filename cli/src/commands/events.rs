//! `dalgu events` and `dalgu vm events`: what has happened, and what happens.

use dalgu_proto::v1;
use tonic::{Code, Streaming};

use super::Session;
use crate::{
    args::{EventKind, EventsArgs},
    client::{Backoff, is_lost},
    exit::Error,
    output::{self, Cell, Format, Resource as _, json, table},
};

/// Shows events about one VM or host, or about all when the subject is empty.
pub async fn run(subject: &str, args: &EventsArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let kind = args.kind.map(|kind| match kind {
        EventKind::Vm => v1::EventKind::Vm,
        EventKind::Host => v1::EventKind::Host,
        EventKind::Operation => v1::EventKind::Operation,
        EventKind::Image => v1::EventKind::Image,
        EventKind::Network => v1::EventKind::Network,
        EventKind::SecurityGroup => v1::EventKind::SecurityGroup,
        EventKind::Volume => v1::EventKind::Volume,
        EventKind::Plan => v1::EventKind::Plan,
    });
    let wanted = |event: &v1::Event| kind.is_none_or(|kind| event.kind() == kind);
    let (events, version) = past(subject, args.limit, &wanted, session).await?;
    if !args.follow {
        return output::list(session.term, session.format, &events);
    }
    let mut lines = Lines::default();
    lines.print(&events, session)?;
    let request = v1::WatchEventsRequest {
        after_resource_version: version,
        kinds: kind.into_iter().map(Into::into).collect(),
        subject: subject.to_owned(),
    };
    follow(request, session, &mut lines).await
}

/// The last events, oldest first, and the version of the newest that is kept.
async fn past(
    subject: &str,
    limit: usize,
    wanted: &impl Fn(&v1::Event) -> bool,
    session: &Session<'_>,
) -> Result<(Vec<v1::Event>, u64), Error> {
    let page_size = i32::try_from(limit.max(1))
        .unwrap_or(super::PAGE)
        .min(super::PAGE);
    let mut request = v1::ListEventsRequest {
        page_size,
        page_token: String::new(),
        subject: subject.to_owned(),
    };
    let (mut events, mut newest) = (Vec::new(), 0);
    loop {
        let page = session
            .read(async |client| client.events().list_events(request.clone()).await)
            .await?;
        newest = page
            .events
            .iter()
            .map(|event| event.resource_version)
            .fold(newest, u64::max);
        events.extend(page.events.into_iter().filter(|event| wanted(event)));
        if page.next_page_token.is_empty() || events.len() >= limit {
            break;
        }
        request.page_token = page.next_page_token;
    }
    events.truncate(limit);
    events.reverse();
    Ok((events, newest))
}

async fn follow(
    mut request: v1::WatchEventsRequest,
    session: &mut Session<'_>,
    lines: &mut Lines,
) -> Result<(), Error> {
    let mut backoff = Backoff::default();
    loop {
        let status = match session.client.events().watch_events(request.clone()).await {
            Ok(answer) => {
                backoff = Backoff::default();
                drain(answer.into_inner(), &mut request, session, lines).await?
            }
            Err(status) => status,
        };
        if status.code() == Code::OutOfRange {
            session
                .term
                .say("some events are no longer kept; going on with new ones")?;
            request.after_resource_version = 0;
        } else if is_lost(&status) {
            session
                .term
                .say("the connection to the controller was lost; trying again")?;
        } else {
            return Err(status.into());
        }
        backoff.pause().await;
    }
}

/// Shows events until the stream ends; gives why it did.
async fn drain(
    mut stream: Streaming<v1::Event>,
    request: &mut v1::WatchEventsRequest,
    session: &mut Session<'_>,
    lines: &mut Lines,
) -> Result<tonic::Status, Error> {
    loop {
        match stream.message().await {
            Ok(Some(event)) => {
                request.after_resource_version = event.resource_version;
                lines.print(&[event], session)?;
            }
            Ok(None) => return Ok(tonic::Status::unavailable("the stream of events ended")),
            Err(status) => return Ok(status),
        }
    }
}

/// Events one under the other.
#[derive(Default)]
struct Lines {
    begun: bool,
    widths: Vec<u16>,
}

impl Lines {
    fn print(&mut self, events: &[v1::Event], session: &mut Session<'_>) -> Result<(), Error> {
        let mut text = String::new();
        match session.format {
            Format::Json => {
                for event in events {
                    text += &json::line(event)?;
                }
            }
            Format::Yaml => {
                for event in events {
                    text += &format!("---\n{}", json::yaml(event)?);
                }
            }
            Format::Name => text = events.iter().map(|event| format!("{}\n", event.reason)).collect(),
            Format::Table | Format::Wide if events.is_empty() => {}
            format => {
                let wide = format == Format::Wide;
                let rows: Vec<Vec<Cell>> = events
                    .iter()
                    .map(|event| event.row(wide, (session.term.now)()))
                    .collect();
                let style = table::Style {
                    color: session.term.color,
                    no_header: std::mem::replace(&mut self.begun, true),
                    widths: std::mem::take(&mut self.widths),
                };
                (text, self.widths) = table::build(v1::Event::columns(wide), rows, &style);
                // A long message must not push the end of all later lines out.
                if let Some(last) = self.widths.get_mut(4) {
                    *last = if wide { 40 } else { 1 };
                }
            }
        }
        Ok(session.term.print(&text)?)
    }
}
