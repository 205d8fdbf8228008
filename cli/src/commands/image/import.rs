//! `dalgu image import`: enters an image, brings its bytes, and waits until VMs can be made from it.
//!
//! Every part may be repeated: an image that was entered before with the same file is taken up where it stands, in the same
//! call after a broken connection, and in another one after anything else.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::Duration,
};

use dalgu_proto::{
    image::{Digest, Format, MAX_PIECE_BYTES},
    reason, v1,
};
use futures::{SinkExt as _, channel::mpsc};
use ring::digest::{Context, SHA256};
use tokio::{
    io::{AsyncReadExt as _, AsyncSeekExt as _},
    time::{Instant, sleep_until},
};
use tonic::{Code, Status};
use v1::ImageState as S;

use super::super::{Session, map, request_id, show::get};
use crate::{
    args::{WaitArgs, image::ImportArgs},
    client::{Backoff, CALL_TIMEOUT, is_lost},
    exit::Error,
    output::{self, Format as Output, Resource as _, human},
    progress::Progress,
};

/// Pieces on their way.
const ON_THE_WAY: usize = 2;
/// Time between two questions how far it is, on a screen and elsewhere.
const ASK: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(1));

/// Does the command.
pub(super) async fn import(args: ImportArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let mut progress = Progress::new(session.term);
    let interrupt = (session.term.interrupt)();
    let name = name(&args)?;
    let key = format!("{name}:{}", args.version);
    // Cancel safe: what has come is kept by the host, and the same command again goes on from there.
    let outcome = tokio::select! {
        outcome = bring(&args, name, &mut progress, session) => outcome,
        () = interrupt => Err(Error::ImportInterrupted(key)),
    };
    progress.clear();
    let image = outcome?;
    match session.format {
        Output::Table | Output::Wide => {
            let key = human::clean(&image.key());
            let text = match image.status.clone().unwrap_or_default().state() {
                S::Available => format!("{key} is available"),
                _ => format!("{key} has all its bytes; `dalgu image get {key}` shows when it is available"),
            };
            Ok(session.term.say(&text)?)
        }
        format => output::one(session.term, format, &image),
    }
}

/// The name that was given, or the file's without its ending.
fn name(args: &ImportArgs) -> Result<String, Error> {
    if let Some(name) = &args.name {
        return Ok(name.clone());
    }
    let file = file_name(args);
    let stem = file.split('.').next().unwrap_or_default().to_ascii_lowercase();
    match stem.parse::<dalgu_proto::ids::ImageName>() {
        Ok(name) => Ok(name.to_string()),
        Err(_) => Err(Error::Usage(format!(
            "{file:?} gives no name for the image: say --name NAME"
        ))),
    }
}

fn file_name(args: &ImportArgs) -> String {
    match (&args.file, &args.from_host) {
        (Some(path), _) => path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        (None, file) => file.clone().unwrap_or_default().file,
    }
}

async fn bring(
    args: &ImportArgs,
    name: String,
    progress: &mut Progress,
    session: &mut Session<'_>,
) -> Result<v1::Image, Error> {
    let image = described(args, name, progress, session).await?;
    let key = image.key().into_owned();
    let mut entered = enter(args, image, session).await?;
    if let Some(path) = &args.file {
        let state = |image: &v1::Image| image.status.clone().unwrap_or_default().state();
        if state(&entered) == S::AwaitingUpload {
            upload(path, &entered, args, progress, session).await?;
        }
        entered = get(&session.client, &key).await?;
    }
    if args.no_wait {
        return Ok(entered);
    }
    available(entered, args, progress, session).await
}

/// The image as it is to be entered, with size and checksum of its file.
async fn described(
    args: &ImportArgs,
    name: String,
    progress: &mut Progress,
    session: &mut Session<'_>,
) -> Result<v1::Image, Error> {
    let format = match args.format {
        Some(format) => v1::ImageFormat::from(format),
        None => Format::of_name(&file_name(args))
            .map(Into::into)
            .ok_or_else(|| Error::Usage("the file's name says no format: say --format FORMAT".to_owned()))?,
    };
    let given: Option<Digest> = args
        .sha256
        .as_ref()
        .map(|digits| digits.parse())
        .transpose()
        .map_err(|error: dalgu_proto::ids::Error| Error::Usage(format!("--sha256: {error}")))?;
    let (size_bytes, sha256) = match &args.file {
        None => (0, given),
        Some(path) => {
            let (size, found) = digest(path, progress, session).await?;
            if given.as_ref().is_some_and(|given| *given != found) {
                let path = path.display();
                let text = format!("{path} is not the file that is meant: its SHA-256 is {found}");
                return Err(Error::Usage(text));
            }
            (size, Some(found))
        }
    };
    Ok(v1::Image {
        name,
        version: args.version.clone(),
        format: format.into(),
        size_bytes,
        sha256: sha256.map(String::from).unwrap_or_default(),
        os: args.os.clone(),
        firmware: args.firmware.map_or(v1::Firmware::Unspecified, Into::into).into(),
        labels: map(args.labels.clone()),
        description: args.description.clone(),
        visibility: if args.private {
            v1::ImageVisibility::Private
        } else {
            v1::ImageVisibility::Public
        }
        .into(),
        replicas: args.replicas.unwrap_or(0),
        ..Default::default()
    })
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::Usage(format!("cannot read {}: {error}", path.display()))
}

/// Size and SHA-256 of a file.
async fn digest(
    path: &Path,
    progress: &mut Progress,
    session: &mut Session<'_>,
) -> Result<(u64, Digest), Error> {
    let total = std::fs::metadata(path)
        .map_err(|error| unreadable(path, &error))?
        .len();
    let what = format!("reading {}", human::clean(&path.display().to_string()));
    progress.bytes(&what, 0, total, session.term)?;
    let own = path.to_owned();
    let read = move || {
        let (mut file, mut context) = (File::open(&own)?, Context::new(&SHA256));
        let (mut piece, mut size) = (vec![0; MAX_PIECE_BYTES], 0_u64);
        loop {
            let count = file.read(&mut piece)?;
            if count == 0 {
                return Ok((size, context.finish()));
            }
            size += count as u64;
            context.update(&piece[..count]);
        }
    };
    let (size, digest) = match tokio::task::spawn_blocking(read).await {
        Ok(read) => read.map_err(|error: io::Error| unreadable(path, &error))?,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    let bytes = digest.as_ref().try_into().expect("SHA-256 has 32 bytes");
    Ok((size, Digest::from_bytes(bytes)))
}

/// Whether an image that is there was entered with the same file. Of one on a host its place tells where no checksum was given.
fn is_same(there: &v1::Image, image: &v1::Image, from_host: Option<&v1::ImageFile>) -> bool {
    let deleted = there
        .status
        .as_ref()
        .is_some_and(|status| status.state() == S::Deleting);
    let same = match (image.sha256.as_str(), from_host) {
        ("", Some(file)) => there.source.as_ref() == Some(file),
        (sha256, _) => there.sha256 == sha256,
    };
    same && !deleted && there.format == image.format
}

/// Enters the image, or finds the one that was entered before with the same file.
async fn enter(args: &ImportArgs, image: v1::Image, session: &mut Session<'_>) -> Result<v1::Image, Error> {
    let request = v1::CreateImageRequest {
        image: Some(image.clone()),
        source: args.from_host.clone(),
        request_id: request_id(args.request_id.as_ref()),
    };
    let entered = session
        .change(CALL_TIMEOUT, async |client| {
            client.images().create_image(request.clone()).await
        })
        .await;
    let taken = match entered {
        Err(error) if error.has_reason("IMAGE_ALREADY_EXISTS") => error,
        outcome => return outcome,
    };
    let there: v1::Image = get(&session.client, &image.key()).await?;
    match is_same(&there, &image, args.from_host.as_ref()) {
        true => Ok(there),
        false => Err(taken),
    }
}

/// Brings the bytes, in one call after the other until all are there.
async fn upload(
    path: &Path,
    image: &v1::Image,
    args: &ImportArgs,
    progress: &mut Progress,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let limit = args.timeout.unwrap_or(WaitArgs::DEFAULT);
    let (mut backoff, mut lost) = (Backoff::default(), false);
    let mut way = Way {
        done: 0,
        since: Instant::now(),
    };
    loop {
        let status = match one_call(path, image, limit, &mut way, progress, session).await? {
            None => return Ok(()),
            Some(status) => status,
        };
        // The last answer may have been lost with the connection.
        if reason::of(&status).as_deref() == Some("IMAGE_NOT_AWAITING_UPLOAD") {
            return Ok(());
        }
        if !may_go_on(&status) {
            return Err(status.into());
        }
        if way.since.elapsed() >= limit {
            return Err(timed_out(image, limit));
        }
        if !std::mem::replace(&mut lost, true) {
            progress.note(
                "the upload was broken off; it goes on where it stands",
                session.term,
            )?;
        }
        backoff.pause().await;
    }
}

/// How much the host has, and since when.
struct Way {
    done: u64,
    since: Instant,
}

fn timed_out(image: &v1::Image, limit: Duration) -> Error {
    Error::ImageTimedOut {
        image: human::clean(&image.key()),
        limit: human::fine_span(limit),
    }
}

/// Whether an upload that ended so is to be taken up.
fn may_go_on(status: &Status) -> bool {
    let known = reason::of(status);
    is_lost(status)
        || matches!(
            known.as_deref(),
            Some("UPLOAD_STALLED" | "UPLOAD_IN_PROGRESS" | "HOST_UNREACHABLE" | "OVERLOADED")
        )
        || (known.is_none() && status.code() == Code::DeadlineExceeded)
}

/// One call: `None` when the host has all, else why it ended.
async fn one_call(
    path: &Path,
    image: &v1::Image,
    limit: Duration,
    way: &mut Way,
    progress: &mut Progress,
    session: &mut Session<'_>,
) -> Result<Option<Status>, Error> {
    let (mut sender, requests) = mpsc::channel(ON_THE_WAY);
    let first = v1::UploadImageRequest {
        name: image.name.clone(),
        version: image.version.clone(),
        ..Default::default()
    };
    // There is room for it.
    let _ = sender.try_send(first);
    let mut answers = match session.client.images().upload_image(requests).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return Ok(Some(status)),
    };
    let what = format!("uploading {}", human::clean(&image.key()));
    let (mut begun, mut sending) = (false, None);
    loop {
        let deadline = way.since + limit;
        // Cancel safe: an answer that is lost is told again by the next call.
        let answer = tokio::select! {
            answer = answers.message() => answer,
            () = sleep_until(deadline) => return Err(timed_out(image, limit)),
        };
        let received = match answer {
            Ok(Some(answer)) => answer.received_bytes,
            Ok(None) => return Ok(Some(Status::unavailable("the upload ended before its end"))),
            Err(status) => return Ok(Some(status)),
        };
        if !std::mem::replace(&mut begun, true) {
            let send = send(path.to_owned(), received, sender.clone());
            sending = Some(tokio::spawn(send));
        }
        if received > way.done {
            *way = Way {
                done: received,
                since: Instant::now(),
            };
        }
        progress.bytes(&what, received, image.size_bytes, session.term)?;
        if received >= image.size_bytes {
            return Ok(None);
        }
        if let Some(Ok(Err(error))) = finished(&mut sending).await {
            return Err(unreadable(path, &error));
        }
    }
}

type Sending = tokio::task::JoinHandle<io::Result<()>>;

/// How the sending ended, if it just has.
async fn finished(sending: &mut Option<Sending>) -> Option<Result<io::Result<()>, tokio::task::JoinError>> {
    let ended = sending.take_if(|sending| sending.is_finished())?;
    Some(ended.await)
}

/// Sends a file from an offset on, as fast as pieces are taken.
async fn send(path: PathBuf, from: u64, mut sender: mpsc::Sender<v1::UploadImageRequest>) -> io::Result<()> {
    let mut file = tokio::fs::File::open(&path).await?;
    file.seek(io::SeekFrom::Start(from)).await?;
    let mut offset = from;
    loop {
        let mut data = Vec::with_capacity(MAX_PIECE_BYTES);
        let most = u64::try_from(MAX_PIECE_BYTES).unwrap_or(u64::MAX);
        (&mut file).take(most).read_to_end(&mut data).await?;
        if data.is_empty() {
            // The stream stays open: the host says when it has all.
            return Ok(());
        }
        let length = data.len() as u64;
        let piece = v1::UploadImageRequest {
            offset,
            data: data.into(),
            ..Default::default()
        };
        if sender.send(piece).await.is_err() {
            // The call has ended; its answer says why.
            return Ok(());
        }
        offset += length;
    }
}

/// Waits until VMs can be made from it.
async fn available(
    mut image: v1::Image,
    args: &ImportArgs,
    progress: &mut Progress,
    session: &mut Session<'_>,
) -> Result<v1::Image, Error> {
    let limit = args.timeout.unwrap_or(WaitArgs::DEFAULT);
    let key = image.key().into_owned();
    let (mut seen, mut since) = (None, Instant::now());
    let pause = if session.term.err_screen { ASK.0 } else { ASK.1 };
    let mut backoff = Backoff::default();
    loop {
        let status = image.status.clone().unwrap_or_default();
        match status.state() {
            S::Available => return Ok(image),
            S::Failed => {
                let error = status.error.unwrap_or_default();
                return Err(Error::ImageRefused {
                    image: human::clean(&key),
                    why: human::clean(&format!("{} ({})", error.message, error.reason)),
                });
            }
            _ => {}
        }
        let now = (status.state, status.bytes_done);
        if seen != Some(now) {
            (seen, since) = (Some(now), Instant::now());
        } else if since.elapsed() >= limit {
            return Err(timed_out(&image, limit));
        }
        let what = format!("importing {}", human::clean(&key));
        progress.bytes(&what, status.bytes_done, status.bytes_total, session.term)?;
        tokio::time::sleep(pause).await;
        match get(&session.client, &key).await {
            Ok(now) => image = now,
            Err(status) if is_lost(&status) && since.elapsed() < limit => backoff.pause().await,
            Err(status) => return Err(status.into()),
        }
    }
}
