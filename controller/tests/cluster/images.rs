//! What the pretended hosts do with images: take uploads, import, fetch from each other, remove; by the contract.

use std::collections::BTreeMap;

use dalgu_proto::{
    agent::v1::{self as agent, ImagePhase, agent_image_service_server::AgentImageService},
    reason,
    v1::VmError,
};
use futures::{StreamExt, stream::BoxStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    agent::{Agent, refuse},
    fabric::World,
};

/// Size of the disk in every pretended image: no whole number of MiB.
pub const VIRTUAL_BYTES: u64 = (5 << 20) + 1;
/// What a pretended host can take of images.
pub const CAPACITY: u64 = 100 << 30;

#[derive(Debug, Clone, Default)]
pub struct Import {
    pub data: Vec<u8>,
    pub size: u64,
    pub phase: ImagePhase,
    sha256: String,
    uploading: bool,
    error: String,
}

#[derive(Debug, Clone, Default)]
pub struct Copy {
    pub bytes: u64,
    pub done: u64,
    pub phase: ImagePhase,
    pub sources: Vec<String>,
    pub last_use: i64,
}

#[derive(Debug, Clone, Default)]
pub struct Images {
    pub imports: BTreeMap<String, Import>,
    pub copies: BTreeMap<String, Copy>,
    /// Files in the images directory.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Bytes that something else takes.
    pub taken: u64,
    /// Nothing that is under way gets on.
    pub frozen: bool,
    /// An import ends in the moment in which it is to be forgotten.
    pub ends_late: bool,
    /// An upload breaks off when so much has come in one call.
    pub breaks_after: Option<usize>,
    /// Calls that brought bytes.
    pub uploads: u32,
}

pub fn sha256(data: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, data);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Import {
    /// It has led to a copy.
    fn end(&mut self, copies: &mut BTreeMap<String, Copy>) {
        self.phase = ImagePhase::Ready;
        let bytes = self.data.len() as u64;
        copies.entry(sha256(&self.data)).or_insert_with(|| Copy {
            bytes,
            done: bytes,
            phase: ImagePhase::Ready,
            ..Copy::default()
        });
    }
}

impl Images {
    fn used(&self) -> u64 {
        let uploads = self.imports.values().map(|import| import.data.len() as u64);
        let copies = self.copies.values().map(|copy| copy.done);
        uploads.chain(copies).sum()
    }

    pub fn has(&self, digest: &str) -> bool {
        let copy = self.copies.get(digest);
        copy.is_some_and(|copy| copy.phase == ImagePhase::Ready)
    }

    pub fn has_all(&self, needs: &[agent::ImageNeed]) -> bool {
        needs.iter().all(|need| self.has(&need.digest))
    }

    pub fn is_uploading(&self) -> bool {
        self.imports.values().any(|import| import.uploading)
    }

    /// Begins to fetch what is not here; whether all is.
    pub fn fetch_all(&mut self, needs: &[agent::ImageNeed]) -> bool {
        needs.iter().for_each(|need| self.fetch(need));
        self.has_all(needs)
    }

    fn fetch(&mut self, need: &agent::ImageNeed) {
        let copy = self.copies.entry(need.digest.clone()).or_default();
        if !matches!(copy.phase, ImagePhase::Ready | ImagePhase::Fetching) {
            *copy = Copy {
                bytes: need.size_bytes,
                phase: ImagePhase::Fetching,
                sources: need.sources.iter().map(|source| source.host.clone()).collect(),
                ..Copy::default()
            };
        }
    }

    /// Lets imports and fetches of all hosts get on.
    pub fn step(world: &mut World) -> bool {
        let holders = world
            .hosts
            .iter()
            .map(|(name, host)| (name.clone(), host.images.clone()));
        let holders: Vec<_> = holders.collect();
        let has = |host: &String, digest: &str| {
            holders
                .iter()
                .any(|(name, images)| name == host && images.has(digest))
        };
        let mut changed = false;
        for host in world.hosts.values_mut().filter(|host| !host.images.frozen) {
            let images = &mut host.images;
            for import in images
                .imports
                .values_mut()
                .filter(|i| i.phase == ImagePhase::Importing)
            {
                let digest = sha256(&import.data);
                changed = true;
                if !import.sha256.is_empty() && import.sha256 != digest {
                    import.phase = ImagePhase::Failed;
                    import.error = "IMAGE_CHECKSUM".to_owned();
                    continue;
                }
                import.end(&mut images.copies);
            }
            for (digest, copy) in &mut images.copies {
                if copy.phase == ImagePhase::Fetching {
                    changed = true;
                    let there = copy.sources.iter().any(|source| has(source, digest));
                    copy.phase = if there {
                        ImagePhase::Ready
                    } else {
                        ImagePhase::Failed
                    };
                    copy.done = if there { copy.bytes } else { 0 };
                }
            }
        }
        changed
    }

    fn import_report(&self, uid: &str) -> agent::ImageReport {
        let Some(import) = self.imports.get(uid) else {
            return agent::ImageReport {
                image_uid: uid.into(),
                ..Default::default()
            };
        };
        let ready = import.phase == ImagePhase::Ready;
        let bytes = import.data.len() as u64;
        agent::ImageReport {
            image_uid: uid.into(),
            digest: if ready {
                sha256(&import.data)
            } else {
                String::new()
            },
            phase: import.phase.into(),
            bytes_done: bytes,
            bytes_total: if ready { bytes } else { import.size },
            virtual_size_bytes: if ready { VIRTUAL_BYTES } else { 0 },
            source_sha256: if ready {
                sha256(&import.data)
            } else {
                String::new()
            },
            source_bytes: if ready { bytes } else { 0 },
            error: (!import.error.is_empty()).then(|| VmError {
                reason: import.error.clone(),
                message: "it is another file".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn copy_report(&self, digest: &str, in_use: bool) -> agent::ImageReport {
        let copy = self.copies.get(digest).cloned().unwrap_or_default();
        agent::ImageReport {
            digest: digest.into(),
            phase: copy.phase.into(),
            bytes_done: copy.done,
            bytes_total: copy.bytes,
            last_use_time: Some(prost_types::Timestamp {
                seconds: copy.last_use,
                nanos: 0,
            }),
            in_use,
            ..Default::default()
        }
    }
}

/// Whether a VM of a host has a disk of that image.
fn in_use(host: &super::fabric::Host, digest: &str) -> bool {
    let specs = host.vms.values().filter_map(|vm| vm.intent.spec.as_ref());
    specs
        .flat_map(|spec| &spec.disks)
        .any(|disk| disk.image_digest == digest)
}

impl Agent {
    pub fn inventory_of_images(&self) -> agent::ImageInventory {
        let world = self.fabric.lock();
        let host = &world.hosts[&self.name];
        let images = &host.images;
        let imports = images.imports.keys().map(|uid| images.import_report(uid));
        let copies = images
            .copies
            .keys()
            .map(|digest| images.copy_report(digest, in_use(host, digest)));
        agent::ImageInventory {
            images: imports.chain(copies).collect(),
            used_bytes: images.used(),
            available_bytes: CAPACITY.saturating_sub(images.used() + images.taken),
        }
    }

    /// Takes one piece; how much is there then, and whether the call breaks off.
    fn take(&self, uid: &str, piece: &agent::UploadImageRequest, so_far: usize) -> Result<u64, Status> {
        let mut world = self.fabric.lock();
        let host = world.hosts.get_mut(&self.name).unwrap();
        let breaks = host.images.breaks_after.is_some_and(|after| so_far >= after);
        if host.cut_off || breaks {
            host.images.breaks_after = None;
            return Err(Status::unavailable("the connection broke"));
        }
        let import = host.images.imports.get_mut(uid).ok_or_else(|| refuse("GONE"))?;
        let wrong = piece.offset != import.data.len() as u64;
        if wrong || piece.offset + piece.data.len() as u64 > import.size {
            return Err(reason::invalid(
                "offset",
                "is not the next one, or more than was said",
            ));
        }
        import.data.extend(&piece.data);
        if import.data.len() as u64 == import.size {
            import.phase = ImagePhase::Received;
        }
        Ok(import.data.len() as u64)
    }

    fn let_go(&self, uid: &str) {
        if let Some(host) = self.fabric.lock().hosts.get_mut(&self.name)
            && let Some(import) = host.images.imports.get_mut(uid)
        {
            import.uploading = false;
        }
    }
}

type Told = mpsc::Sender<Result<agent::UploadImageResponse, Status>>;

impl Agent {
    async fn receive(&self, uid: String, mut pieces: Streaming<agent::UploadImageRequest>, told: Told) {
        let mut so_far = 0;
        while let Ok(Some(piece)) = pieces.message().await {
            so_far += piece.data.len();
            let answer = self.take(&uid, &piece, so_far);
            let failed = answer.is_err();
            let answer = answer.map(|received_bytes| agent::UploadImageResponse { received_bytes });
            if told.send(answer).await.is_err() || failed {
                break;
            }
        }
        self.let_go(&uid);
    }
}

#[tonic::async_trait]
impl AgentImageService for Agent {
    type UploadImageStream = BoxStream<'static, Result<agent::UploadImageResponse, Status>>;

    async fn upload_image(
        &self,
        request: Request<Streaming<agent::UploadImageRequest>>,
    ) -> Result<Response<Self::UploadImageStream>, Status> {
        let mut pieces = request.into_inner();
        let first = pieces.message().await?.unwrap();
        let uid = first.image_uid.clone();
        let received_bytes = self
            .command("UploadImage", first.context.clone(), |host| {
                let import = host.images.imports.entry(uid.clone()).or_insert_with(|| Import {
                    size: first.size_bytes,
                    phase: ImagePhase::Receiving,
                    ..Import::default()
                });
                if import.uploading {
                    let message = "another call brings it";
                    return Err(reason::status(Code::Aborted, "UPLOAD_IN_PROGRESS", message));
                }
                import.uploading = true;
                host.images.uploads += 1;
                Ok(import.data.len() as u64)
            })?
            .into_inner();
        let (told, answers) = mpsc::channel(1);
        let _ = told.send(Ok(agent::UploadImageResponse { received_bytes })).await;
        let agent = self.clone();
        tokio::spawn(async move { agent.receive(uid, pieces, told).await });
        Ok(Response::new(ReceiverStream::new(answers).boxed()))
    }

    async fn import_image(
        &self,
        request: Request<agent::ImportImageRequest>,
    ) -> Result<Response<agent::ImageReport>, Status> {
        let request = request.into_inner();
        self.command("ImportImage", request.context, |host| {
            let images = &mut host.images;
            if let Some(data) = images.files.get(&request.file).cloned() {
                images
                    .imports
                    .entry(request.image_uid.clone())
                    .or_insert_with(|| Import {
                        size: data.len() as u64,
                        data,
                        phase: ImagePhase::Received,
                        ..Import::default()
                    });
            } else if !request.file.is_empty() {
                let message = "there is no such file";
                return Err(reason::status(Code::NotFound, "IMAGE_NOT_FOUND", message));
            }
            let import = images
                .imports
                .get_mut(&request.image_uid)
                .ok_or_else(|| refuse("NOT_UPLOADED"))?;
            if import.phase == ImagePhase::Received {
                import.phase = ImagePhase::Importing;
                import.sha256 = request.sha256;
            }
            Ok(images.import_report(&request.image_uid))
        })
    }

    async fn fetch_image(
        &self,
        request: Request<agent::FetchImageRequest>,
    ) -> Result<Response<agent::ImageReport>, Status> {
        let request = request.into_inner();
        self.command("FetchImage", request.context, |host| {
            let need = request.image.unwrap();
            host.images.fetch(&need);
            Ok(host.images.copy_report(&need.digest, false))
        })
    }

    async fn remove_image(
        &self,
        request: Request<agent::RemoveImageRequest>,
    ) -> Result<Response<agent::RemoveImageResponse>, Status> {
        let request = request.into_inner();
        self.command("RemoveImage", request.context, |host| {
            if in_use(host, &request.digest) {
                return Err(refuse("IMAGE_IN_USE"));
            }
            let images = &mut host.images;
            images.copies.remove(&request.digest);
            if let Some(import) = images.imports.get_mut(&request.image_uid)
                && images.ends_late
                && import.phase == ImagePhase::Importing
            {
                import.end(&mut images.copies);
            }
            let import = images.imports.get(&request.image_uid);
            let ready = import.is_some_and(|import| import.phase == ImagePhase::Ready);
            if request.unless_ready && ready {
                let left = Some(images.import_report(&request.image_uid));
                return Ok(agent::RemoveImageResponse { left });
            }
            images.imports.remove(&request.image_uid);
            Ok(agent::RemoveImageResponse { left: None })
        })
    }
}
