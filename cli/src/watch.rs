//! `--watch`: shows objects, then their changes as they come. Lists first, follows the stream of events from there,
//! takes a broken stream up where it broke, and lists again when the controller no longer knows that point.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::v1;
use tokio::time::{Instant, sleep_until};
use tonic::{Code, Status, Streaming};

use crate::{
    client::{Backoff, Client, is_lost},
    exit::Error,
    output::{self, Cell, Format, Resource, Term, json, table},
};

/// On a screen, figures that make no event (load, rates) are refreshed so often.
const REFRESH: Duration = Duration::from_secs(5);

/// An object that events bear.
pub trait Watched: Resource {
    /// The kind of its events.
    const KIND: v1::EventKind;
    /// Takes it out of an event.
    fn of(object: v1::event::Object) -> Option<Self>;
    /// The object's name as the event gives it.
    fn key_of(event: &v1::Event) -> &str;
    /// Puts objects, which come in the order of their names, into the order of their list.
    fn sort(_items: &mut [Self]) {}
}

/// Objects that events name by their subject.
macro_rules! watched {
    ($($object:ident)*) => {
        $(impl Watched for v1::$object {
            const KIND: v1::EventKind = v1::EventKind::$object;

            fn of(object: v1::event::Object) -> Option<Self> {
                match object {
                    v1::event::Object::$object(object) => Some(object),
                    _ => None,
                }
            }

            fn key_of(event: &v1::Event) -> &str {
                &event.subject
            }
        })*
    };
}

watched! { Vm Host Image Network SecurityGroup Volume }

impl Watched for v1::Operation {
    const KIND: v1::EventKind = v1::EventKind::Operation;

    fn of(object: v1::event::Object) -> Option<Self> {
        if let v1::event::Object::Operation(operation) = object {
            Some(operation)
        } else {
            None
        }
    }

    fn key_of(event: &v1::Event) -> &str {
        &event.operation_id
    }

    fn sort(items: &mut [Self]) {
        let newest = |operation: &Self| {
            std::cmp::Reverse(
                operation
                    .create_time
                    .as_ref()
                    .map(|time| (time.seconds, time.nanos)),
            )
        };
        items.sort_by_key(newest);
    }
}

/// What is watched.
pub struct Watch<'a, R> {
    /// The connection.
    pub client: &'a Client,
    /// The form of output.
    pub format: Format,
    /// The one object's name, or empty for all.
    pub subject: &'a str,
    /// Shows one object on its own page instead of in a table, and ends when it is gone.
    pub single: bool,
    /// Which objects are wanted.
    pub wanted: &'a dyn Fn(&R) -> bool,
}

/// All objects, and the version they were read at.
pub type Snapshot<R> = (Vec<R>, u64);

/// A page of a list.
pub struct Page<R> {
    /// What is on it.
    pub items: Vec<R>,
    /// Where the next one begins; empty on the last.
    pub next: String,
    /// The version it was read at.
    pub version: u64,
}

/// Reads page after page, each by the token it is given, until there are `limit` objects.
pub async fn pages<R>(
    limit: usize,
    read: impl AsyncFn(String) -> Result<Page<R>, Status>,
) -> Result<Snapshot<R>, Status> {
    let (mut items, mut version, mut token) = (Vec::new(), None, String::new());
    loop {
        let page = read(token).await?;
        items.extend(page.items);
        // Changes since the first page are told again; later pages may know some of them already.
        let version = *version.get_or_insert(page.version);
        if page.next.is_empty() || items.len() >= limit {
            items.truncate(limit);
            return Ok((items, version));
        }
        token = page.next;
    }
}

enum Next {
    Event(Box<v1::Event>),
    Broken(Status),
    Refresh,
}

impl<R: Watched> Watch<'_, R> {
    /// Shows changes until the user interrupts, the output is closed, or the single object is gone.
    pub async fn run(
        &self,
        term: &mut Term,
        list: impl AsyncFn() -> Result<Snapshot<R>, Status>,
    ) -> Result<(), Error> {
        let (items, mut version) = list().await?;
        let mut view = View {
            items: BTreeMap::new(),
            widths: Vec::new(),
            header: true,
        };
        self.replace(&mut view, items, term)?;
        let gone = |view: &View<R>| self.single && view.items.is_empty();
        let mut backoff = Backoff::default();
        loop {
            let status = match self.open(version).await {
                Ok(mut stream) => {
                    backoff = Backoff::default();
                    match self
                        .follow(&mut stream, &mut version, &mut view, term, &list)
                        .await?
                    {
                        Some(status) => status,
                        None => return Ok(()),
                    }
                }
                Err(status) => status,
            };
            if status.code() == Code::OutOfRange {
                match list().await {
                    Ok((items, newer)) => {
                        version = newer;
                        self.replace(&mut view, items, term)?;
                        if gone(&view) {
                            return Ok(());
                        }
                        continue;
                    }
                    Err(status) if is_lost(&status) => {}
                    Err(status) => return Err(status.into()),
                }
            } else if !is_lost(&status) {
                return Err(status.into());
            }
            if !self.redraws(term) {
                term.say("the connection to the controller was lost; trying again")?;
            }
            backoff.pause().await;
        }
    }

    async fn open(&self, version: u64) -> Result<Streaming<v1::Event>, Status> {
        // Operations are not the stream's subject: their VM is.
        let subject = if R::KIND == v1::EventKind::Operation {
            String::new()
        } else {
            self.subject.to_owned()
        };
        let request = v1::WatchEventsRequest {
            after_resource_version: version,
            kinds: vec![R::KIND.into()],
            subject,
        };
        self.client
            .events()
            .watch_events(request)
            .await
            .map(tonic::Response::into_inner)
    }

    /// Follows one stream. Gives why it ended, or nothing when the object is gone.
    async fn follow(
        &self,
        stream: &mut Streaming<v1::Event>,
        version: &mut u64,
        view: &mut View<R>,
        term: &mut Term,
        list: &impl AsyncFn() -> Result<Snapshot<R>, Status>,
    ) -> Result<Option<Status>, Error> {
        let mut refresh = Instant::now() + REFRESH;
        loop {
            // Cancel safe: a message that was not taken stays in the stream.
            let next = tokio::select! {
                message = stream.message() => match message {
                    Ok(Some(event)) => Next::Event(Box::new(event)),
                    Ok(None) => Next::Broken(Status::unavailable("the stream of events ended")),
                    Err(status) => Next::Broken(status),
                },
                () = sleep_until(refresh), if self.redraws(term) => Next::Refresh,
            };
            match next {
                Next::Broken(status) => return Ok(Some(status)),
                Next::Event(event) => {
                    *version = event.resource_version;
                    if self.apply(view, *event, term)? {
                        return Ok(None);
                    }
                }
                Next::Refresh => {
                    refresh = Instant::now() + REFRESH;
                    // When it fails, the stream is broken too and says so.
                    if let Ok((items, _)) = list().await {
                        self.replace(view, items, term)?;
                        if self.single && view.items.is_empty() {
                            return Ok(None);
                        }
                    }
                }
            }
        }
    }

    fn redraws(&self, term: &Term) -> bool {
        term.out_screen && matches!(self.format, Format::Table | Format::Wide)
    }

    /// Takes a whole new list, shows what is different.
    fn replace(&self, view: &mut View<R>, items: Vec<R>, term: &mut Term) -> Result<(), Error> {
        let items: Vec<R> = items.into_iter().filter(|item| (self.wanted)(item)).collect();
        let before = std::mem::take(&mut view.items);
        let changed: Vec<R> = items
            .iter()
            .filter(|item| before.get(&*item.key()) != Some(*item))
            .cloned()
            .collect();
        view.items = items
            .into_iter()
            .map(|item| (item.key().into_owned(), item))
            .collect();
        if self.redraws(term) {
            return self.redraw(view, term);
        }
        for gone in before.keys().filter(|key| !view.items.contains_key(*key)) {
            self.tell_gone(gone, term)?;
        }
        self.append(view, &changed, term)
    }

    /// Takes an event in. True when there is nothing left to watch.
    fn apply(&self, view: &mut View<R>, event: v1::Event, term: &mut Term) -> Result<bool, Error> {
        let key = R::key_of(&event).to_owned();
        if self.single && key != self.subject {
            return Ok(false);
        }
        let item = event.object.and_then(R::of).filter(|item| (self.wanted)(item));
        let gone = item.is_none();
        let changed = match item {
            Some(item) => view.items.insert(key.clone(), item.clone()).as_ref() != Some(&item),
            None => view.items.remove(&key).is_some(),
        };
        if !changed {
            return Ok(false);
        }
        if gone && (self.single || !self.redraws(term)) {
            self.tell_gone(&key, term)?;
        }
        if gone && self.single {
            return Ok(true);
        }
        if self.redraws(term) {
            self.redraw(view, term)?;
        } else if let Some(item) = view.items.get(&key).cloned() {
            self.append(view, &[item], term)?;
        }
        Ok(false)
    }

    fn tell_gone(&self, key: &str, term: &mut Term) -> Result<(), Error> {
        match self.format {
            Format::Json => {
                let line = serde_json::json!({ "name": key, "deleted": true });
                term.print(&format!("{line}\n"))?;
            }
            _ => term.say(&format!("{} is gone", output::human::clean(key)))?,
        }
        Ok(())
    }

    fn redraw(&self, view: &View<R>, term: &mut Term) -> Result<(), Error> {
        let mut items: Vec<R> = view.items.values().cloned().collect();
        R::sort(&mut items);
        let now = (term.now)();
        let text = match items.first() {
            Some(item) if self.single => item.describe(now).render(term.color),
            None => format!("no {}\n", R::PLURAL),
            _ => table::of(&items, self.format == Format::Wide, now, term.color),
        };
        // Home, each line to its end, then what is left below: no flicker.
        let text = text.replace('\n', "\x1b[K\n");
        Ok(term.print(&format!("\x1b[H{text}\x1b[J"))?)
    }

    fn append(&self, view: &mut View<R>, items: &[R], term: &mut Term) -> Result<(), Error> {
        if items.is_empty() {
            return Ok(());
        }
        let mut text = String::new();
        match self.format {
            Format::Json => {
                for item in items {
                    text += &json::line(item)?;
                }
            }
            Format::Yaml => {
                for item in items {
                    text += "---\n";
                    text += &json::yaml(item)?;
                }
            }
            Format::Name => text = items.iter().map(|item| format!("{}\n", item.key())).collect(),
            Format::Table | Format::Wide => {
                let wide = self.format == Format::Wide;
                let rows: Vec<Vec<Cell>> = items.iter().map(|item| item.row(wide, (term.now)())).collect();
                text = view.rows(R::columns(wide), rows, term.color);
            }
        }
        Ok(term.print(&text)?)
    }
}

/// What has been shown so far.
struct View<R> {
    items: BTreeMap<String, R>,
    widths: Vec<u16>,
    header: bool,
}

impl<R> View<R> {
    fn rows(&mut self, columns: &[&str], rows: Vec<Vec<Cell>>, color: bool) -> String {
        let style = table::Style {
            color,
            no_header: !self.header,
            widths: std::mem::take(&mut self.widths),
        };
        let (text, widths) = table::build(columns, rows, &style);
        (self.widths, self.header) = (widths, false);
        text
    }
}
