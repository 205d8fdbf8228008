//! The calls of libvirt that the `virt` crate lacks or gets wrong, each wrapped so that its caller needs no `unsafe`.
//!
//! The only file of Dalgu with `unsafe` in it. Called by the other files of `libvirt/` on their own threads; nothing
//! here decides anything. Rules kept below: every string passed is checked for NUL by `CString`; memory that libvirt
//! allocates is freed by libvirt; an error is read on the thread of the call, right after it; no panic crosses C.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::{CStr, CString, c_char, c_int, c_longlong, c_uint, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use uuid::Uuid;
use virt::{connect::Connect, domain::Domain, error::Error};
use virt_sys as sys;

/// What the event loop tells.
#[derive(Debug)]
pub(super) enum Event {
    /// Something happened to this domain.
    Domain(Uuid),
    /// The processors of this domain have stopped, so long ago.
    Stopped(Uuid, Duration),
    /// The guest of this domain was reset.
    Reset(Uuid),
    /// A job of this domain has ended; its last figures.
    JobCompleted(Uuid, Params),
    /// The connection is closed, with libvirt's number for the reason.
    Closed(c_int),
}

/// Takes events, on libvirt's event loop: must be quick and must not call libvirt.
pub(super) type Sink = Arc<dyn Fn(Event) + Send + Sync>;

/// A value of a typed parameter.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
}

/// Typed parameters by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Params(HashMap<String, Value>);

impl Params {
    /// A count; negative ones and other types are as good as absent.
    pub(super) fn count(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            Value::Unsigned(value) => Some(*value),
            Value::Signed(value) => u64::try_from(*value).ok(),
            Value::Float(_) | Value::Text(_) => None,
        }
    }

    /// A text.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            Value::Text(value) => Some(value),
            _ => None,
        }
    }
}

/// SAFETY: the caller promises `count` parameters at `params`, as libvirt hands them out.
unsafe fn read_params(params: sys::virTypedParameterPtr, count: c_int) -> Params {
    let mut read = HashMap::new();
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: within the array promised by the caller; the name ends in NUL, the type says which member of the
        // union holds, and a string is NUL-terminated.
        let (name, value) = unsafe {
            let param = &*params.add(index);
            let name = CStr::from_ptr(param.field.as_ptr())
                .to_string_lossy()
                .into_owned();
            let value = match c_uint::try_from(param.type_).unwrap_or(0) {
                sys::VIR_TYPED_PARAM_INT => Value::Signed(param.value.i.into()),
                sys::VIR_TYPED_PARAM_UINT => Value::Unsigned(param.value.ui.into()),
                sys::VIR_TYPED_PARAM_LLONG => Value::Signed(param.value.l),
                sys::VIR_TYPED_PARAM_ULLONG => Value::Unsigned(param.value.ul),
                sys::VIR_TYPED_PARAM_DOUBLE => Value::Float(param.value.d),
                sys::VIR_TYPED_PARAM_BOOLEAN => Value::Unsigned(u64::from(param.value.b != 0)),
                sys::VIR_TYPED_PARAM_STRING if !param.value.s.is_null() => {
                    Value::Text(CStr::from_ptr(param.value.s).to_string_lossy().into_owned())
                }
                _ => continue,
            };
            (name, value)
        };
        read.insert(name, value);
    }
    Params(read)
}

fn checked(result: c_int) -> Result<c_int, Error> {
    if result < 0 {
        Err(Error::last_error())
    } else {
        Ok(result)
    }
}

/// SAFETY: `domain` is a live domain object.
unsafe fn uuid_of(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0_u8; 16];
    // SAFETY: 16 bytes are what it writes.
    let result = unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) };
    (result == 0).then(|| Uuid::from_bytes(bytes))
}

/// SAFETY: `opaque` is what [`opaque_of`] made and [`free_sink`] has not yet taken.
unsafe fn tell(opaque: *mut c_void, event: Option<Event>) {
    // SAFETY: see above; only shared access, and the sink is Sync.
    let sink = unsafe { &*opaque.cast::<Sink>() };
    if let Some(event) = event {
        // A panic must not unwind into C; the panic hook has told of it.
        let _ = catch_unwind(AssertUnwindSafe(|| sink(event)));
    }
}

fn opaque_of(sink: &Sink) -> *mut c_void {
    Box::into_raw(Box::new(sink.clone())).cast()
}

unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: libvirt calls this once for each registration, with what opaque_of made.
    drop(unsafe { Box::from_raw(opaque.cast::<Sink>()) });
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _: c_int,
    _: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a live domain and our own opaque pointer.
    unsafe { tell(opaque, uuid_of(domain).map(Event::Domain)) };
    0
}

unsafe extern "C" fn on_stop(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _: *const c_char,
    seconds: c_longlong,
    micros: c_uint,
    _: *const c_char,
    opaque: *mut c_void,
) {
    let at = Duration::from_secs(u64::try_from(seconds).unwrap_or(0)) + Duration::from_micros(micros.into());
    let ago = (SystemTime::UNIX_EPOCH + at).elapsed().unwrap_or_default();
    // SAFETY: libvirt passes a live domain and our own opaque pointer.
    unsafe { tell(opaque, uuid_of(domain).map(|id| Event::Stopped(id, ago))) };
}

unsafe extern "C" fn on_reset(_: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: libvirt passes a live domain and our own opaque pointer.
    unsafe { tell(opaque, uuid_of(domain).map(Event::Reset)) };
}

unsafe extern "C" fn on_device(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a live domain and our own opaque pointer.
    unsafe { tell(opaque, uuid_of(domain).map(Event::Domain)) };
}

unsafe extern "C" fn on_job_completed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    params: sys::virTypedParameterPtr,
    count: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a live domain, the parameters it counts (and frees itself), and our own opaque pointer.
    unsafe {
        tell(
            opaque,
            uuid_of(domain).map(|id| Event::JobCompleted(id, read_params(params, count))),
        )
    };
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes our own opaque pointer.
    unsafe { tell(opaque, Some(Event::Closed(reason))) };
}

/// Events of a connection, until dropped. Dropping it calls libvirt and may block.
pub(super) struct Subscription {
    connect: Connect,
    callbacks: Vec<c_int>,
    /// Of an event of QEMU itself.
    of_monitor: Option<c_int>,
    closes: bool,
}

impl Subscription {
    /// Subscribes to the domains of a connection.
    pub(super) fn domains(connect: &Connect, sink: &Sink) -> Result<Self, Error> {
        let mut own = Self {
            connect: connect.clone(),
            callbacks: Vec::new(),
            of_monitor: None,
            closes: false,
        };
        let lifecycle: unsafe extern "C" fn(_, _, _, _, _) -> _ = on_lifecycle;
        let completed: unsafe extern "C" fn(_, _, _, _, _) = on_job_completed;
        let removed: unsafe extern "C" fn(_, _, _, _) = on_device;
        // SAFETY: libvirt's own interface asks for this cast: it calls back with the signature that belongs to the id.
        let (lifecycle, completed, removed) = unsafe {
            (
                std::mem::transmute::<
                    sys::virConnectDomainEventCallback,
                    sys::virConnectDomainEventGenericCallback,
                >(Some(lifecycle)),
                std::mem::transmute::<
                    sys::virConnectDomainEventJobCompletedCallback,
                    sys::virConnectDomainEventGenericCallback,
                >(Some(completed)),
                std::mem::transmute::<
                    sys::virConnectDomainEventDeviceRemovedCallback,
                    sys::virConnectDomainEventGenericCallback,
                >(Some(removed)),
            )
        };
        own.register(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, sink)?;
        // The generic callback is just what this event has. Where a driver does not know it, a guest that reboots is
        // asked until its time is over.
        let _ = own.register(sys::VIR_DOMAIN_EVENT_ID_REBOOT, Some(on_reset), sink);
        // Without it, that a guest has let go of a device is seen at the next look.
        let _ = own.register(sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, removed, sink);
        // Not known to every driver; the migration's figures are then those of the last look.
        let _ = own.register(sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, completed, sink);
        // Other drivers have none; for how long a VM that moved could not be reached is then not known.
        own.of_monitor = own.register_stop(sink).ok();
        Ok(own)
    }

    /// QEMU's own word that the processors have stopped: it bears the time, where libvirt's comes as late as libvirt is busy.
    fn register_stop(&self, sink: &Sink) -> Result<c_int, Error> {
        let opaque = opaque_of(sink);
        // SAFETY: as in `register`.
        let id = checked(unsafe {
            sys::virConnectDomainQemuMonitorEventRegister(
                self.connect.as_ptr(),
                ptr::null_mut(),
                c"STOP".as_ptr(),
                Some(on_stop),
                opaque,
                Some(free_sink),
                0,
            )
        });
        if id.is_err() {
            // SAFETY: libvirt did not take it, so it is ours still.
            unsafe { free_sink(opaque) };
        }
        id
    }

    fn register(
        &mut self,
        event: c_uint,
        callback: sys::virConnectDomainEventGenericCallback,
        sink: &Sink,
    ) -> Result<(), Error> {
        let opaque = opaque_of(sink);
        // SAFETY: the connection lives; the opaque pointer lives until free_sink.
        let id = checked(unsafe {
            let event = c_int::try_from(event).unwrap_or(-1);
            sys::virConnectDomainEventRegisterAny(
                self.connect.as_ptr(),
                ptr::null_mut(),
                event,
                callback,
                opaque,
                Some(free_sink),
            )
        });
        if id.is_err() {
            // SAFETY: libvirt did not take it, so it is ours still.
            unsafe { free_sink(opaque) };
        }
        self.callbacks.push(id?);
        Ok(())
    }

    /// Subscribes to the end of a connection; drivers inside this process have none.
    pub(super) fn close(connect: &Connect, sink: &Sink) -> Result<Self, Error> {
        let opaque = opaque_of(sink);
        // SAFETY: as in `register`.
        let result = checked(unsafe {
            sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), opaque, Some(free_sink))
        });
        if result.is_err() {
            // SAFETY: libvirt did not take it, so it is ours still.
            unsafe { free_sink(opaque) };
        }
        result.map(|_| Self {
            connect: connect.clone(),
            callbacks: Vec::new(),
            of_monitor: None,
            closes: true,
        })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for id in self.callbacks.drain(..) {
            // SAFETY: a live connection and an id it gave. Failure means that it is closed, and the callback with it.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), id) };
        }
        if let Some(id) = self.of_monitor {
            // SAFETY: as above.
            unsafe { sys::virConnectDomainQemuMonitorEventDeregister(self.connect.as_ptr(), id) };
        }
        if self.closes {
            // SAFETY: a live connection and the callback registered on it.
            unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close)) };
        }
    }
}

/// State and reason of a domain; `virt`'s own `state()` takes a failure for an answer.
pub(super) fn state(domain: &Domain) -> Result<(c_int, c_int), Error> {
    let (mut state, mut reason) = (0, 0);
    // SAFETY: a live domain, and two integers to write to.
    checked(unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut reason, 0) })?;
    Ok((state, reason))
}

/// One domain's statistics.
#[derive(Debug)]
pub(super) struct Stats {
    pub(super) id: Uuid,
    /// Number of the run; each start has another.
    pub(super) run: u32,
    pub(super) params: Params,
}

/// Statistics of all domains; `virt`'s own call neither reads nor frees them.
pub(super) fn all_stats(connect: &Connect, kinds: c_uint, flags: c_uint) -> Result<Vec<Stats>, Error> {
    let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: a live connection, and a pointer to write to.
    let count = checked(unsafe {
        sys::virConnectGetAllDomainStats(connect.as_ptr(), kinds, &raw mut records, flags)
    })?;
    let mut all = Vec::new();
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: libvirt gave so many records, each with a live domain and so many parameters.
        unsafe {
            let record = &**records.add(index);
            if let Some(id) = uuid_of(record.dom) {
                let run = sys::virDomainGetID(record.dom);
                all.push(Stats {
                    id,
                    run,
                    params: read_params(record.params, record.nparams),
                });
            }
        }
    }
    // SAFETY: what libvirt allocated for the call above, freed once.
    unsafe { sys::virDomainStatsRecordListFree(records) };
    Ok(all)
}

/// The kind of the job under way (0: none) and its figures; `virt`'s own call frees them with the wrong allocator.
pub(super) fn job_stats(domain: &Domain) -> Result<(c_int, Params), Error> {
    job_stats_flags(domain, 0)
}

/// The kind and the figures of the job that ended last; libvirt tells them once.
pub(super) fn ended_job(domain: &Domain) -> Result<(c_int, Params), Error> {
    job_stats_flags(domain, sys::VIR_DOMAIN_JOB_STATS_COMPLETED)
}

fn job_stats_flags(domain: &Domain, flags: c_uint) -> Result<(c_int, Params), Error> {
    let (mut kind, mut count) = (0, 0);
    let mut params: sys::virTypedParameterPtr = ptr::null_mut();
    // SAFETY: a live domain, and three places to write to.
    checked(unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &raw mut kind,
            &raw mut params,
            &raw mut count,
            flags,
        )
    })?;
    // SAFETY: libvirt gave so many parameters, to be freed once by us.
    unsafe {
        let read = read_params(params, count);
        sys::virTypedParamsFree(params, count);
        Ok((kind, read))
    }
}

/// Ends the job under way.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: a live domain.
    checked(unsafe { sys::virDomainAbortJob(domain.as_ptr()) }).map(drop)
}

/// A merge of a disk's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Commit {
    /// Of a layer below the newest; it ends by itself.
    Below,
    /// Of the newest; it waits to be ended.
    Newest,
}

/// Whether a disk's layers are being merged. `virt` has no call for it.
pub(super) fn commit_job(domain: &Domain, disk: &str) -> Result<Option<Commit>, Error> {
    let disk = CString::new(disk)?;
    // SAFETY: it is plain numbers, of which all may be 0.
    let mut info: sys::virDomainBlockJobInfo = unsafe { std::mem::zeroed() };
    // SAFETY: a live domain, a string that outlives the call, and a place to write to.
    let found =
        checked(unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) })?;
    Ok(match c_uint::try_from(info.type_).unwrap_or(0) {
        _ if found == 0 => None,
        sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT => Some(Commit::Below),
        sys::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT => Some(Commit::Newest),
        _ => None,
    })
}

/// Begins to merge a layer of a disk into the file below it; `newest` when the guest writes to it.
pub(super) fn commit(
    domain: &Domain,
    disk: &str,
    below: &str,
    layer: &str,
    newest: bool,
) -> Result<(), Error> {
    let (disk, below, layer) = (CString::new(disk)?, CString::new(below)?, CString::new(layer)?);
    let flags = match newest {
        true => sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE,
        false => 0,
    };
    // SAFETY: a live domain, and strings that outlive the call.
    checked(unsafe {
        sys::virDomainBlockCommit(
            domain.as_ptr(),
            disk.as_ptr(),
            below.as_ptr(),
            layer.as_ptr(),
            0,
            flags,
        )
    })
    .map(drop)
}

/// Lets a disk whose newest layer is merged go on with the file below.
pub(super) fn end_commit(domain: &Domain, disk: &str) -> Result<(), Error> {
    let disk = CString::new(disk)?;
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT;
    // SAFETY: a live domain, and a string that outlives the call.
    checked(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) }).map(drop)
}

/// The guest's agent has so long for each answer, in seconds; by itself libvirt waits for one that hangs for ever.
const AGENT_SECONDS: c_int = 10;

/// Limits how long the agent in a guest is waited for, where libvirt knows how.
pub(super) fn limit_agent(domain: &Domain) {
    // SAFETY: a live domain. An older libvirt refuses, and waits as long as it likes.
    let _ = unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), AGENT_SECONDS, 0) };
}

/// Begins a backup into files that are there, with a checkpoint of the same moment where one is wanted. The copying goes on as a
/// job of the domain.
pub(super) fn begin_backup(domain: &Domain, backup: &str, checkpoint: Option<&str>) -> Result<(), Error> {
    let backup = CString::new(backup)?;
    let checkpoint = checkpoint.map(CString::new).transpose()?;
    let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |xml| xml.as_ptr());
    let flags = sys::VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL;
    // SAFETY: a live domain, and two strings that outlive the call, of which the second may be absent.
    checked(unsafe { sys::virDomainBackupBegin(domain.as_ptr(), backup.as_ptr(), checkpoint, flags) })
        .map(drop)
}

/// What libvirt says of the backup under way.
pub(super) fn backup_xml(domain: &Domain) -> Result<String, Error> {
    // SAFETY: a live domain.
    let xml = unsafe { sys::virDomainBackupGetXMLDesc(domain.as_ptr(), 0) };
    if xml.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: a text that ends in NUL, made by malloc for us, and freed once.
    unsafe {
        let text = CStr::from_ptr(xml).to_string_lossy().into_owned();
        nix::libc::free(xml.cast());
        Ok(text)
    }
}

/// A domain's checkpoints, until dropped.
pub(super) struct Checkpoints(Vec<sys::virDomainCheckpointPtr>);

impl Checkpoints {
    /// Every checkpoint of a domain.
    pub(super) fn of(domain: &Domain) -> Result<Self, Error> {
        let mut list: *mut sys::virDomainCheckpointPtr = ptr::null_mut();
        // SAFETY: a live domain, and a pointer to write to.
        let count = checked(unsafe { sys::virDomainListAllCheckpoints(domain.as_ptr(), &raw mut list, 0) })?;
        let count = usize::try_from(count).unwrap_or(0);
        // SAFETY: libvirt gave so many references, each now ours, in an array that malloc made and we free once.
        unsafe {
            let all = (0..count).map(|index| *list.add(index)).collect();
            nix::libc::free(list.cast());
            Ok(Self(all))
        }
    }

    /// Their names.
    pub(super) fn names(&self) -> Vec<String> {
        let name = |checkpoint: &sys::virDomainCheckpointPtr| {
            // SAFETY: a live checkpoint, whose name lives as long and ends in NUL.
            unsafe {
                let name = sys::virDomainCheckpointGetName(*checkpoint);
                (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
            }
        };
        self.0.iter().filter_map(name).collect()
    }

    /// Deletes the one of that name, with what the disks keep for it, or where that cannot be, what libvirt knows of it.
    pub(super) fn delete(&self, name: &str) -> Result<(), Error> {
        let names = self.names();
        let found = names.iter().position(|other| other == name);
        let Some(checkpoint) = found.and_then(|index| self.0.get(index)) else {
            return Ok(());
        };
        // SAFETY: a live checkpoint.
        let delete = |flags| checked(unsafe { sys::virDomainCheckpointDelete(*checkpoint, flags) }).map(drop);
        delete(0).or_else(|_| delete(sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY))
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        for checkpoint in self.0.drain(..) {
            // SAFETY: a reference of ours, given back once.
            unsafe { sys::virDomainCheckpointFree(checkpoint) };
        }
    }
}

/// Has the guest's agent freeze its file systems; fails at once where there is no agent, and soon where it hangs.
pub(super) fn freeze(domain: &Domain) -> Result<(), Error> {
    limit_agent(domain);
    // SAFETY: a live domain, and no list: all of them.
    checked(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), ptr::null_mut(), 0, 0) }).map(drop)
}

/// Lets the guest's file systems go on.
pub(super) fn thaw(domain: &Domain) -> Result<(), Error> {
    // SAFETY: as in `freeze`.
    checked(unsafe { sys::virDomainFSThaw(domain.as_ptr(), ptr::null_mut(), 0, 0) }).map(drop)
}

/// Parameters for a call, owned by libvirt's allocator; `virt` leaks those of a migration.
#[derive(Debug)]
struct List {
    params: sys::virTypedParameterPtr,
    count: c_int,
    room: c_int,
}

impl List {
    fn of(values: &[(&str, Value)]) -> Result<Self, Error> {
        let mut list = Self {
            params: ptr::null_mut(),
            count: 0,
            room: 0,
        };
        for (name, value) in values {
            list.add(name, value)?;
        }
        Ok(list)
    }

    fn add(&mut self, name: &str, value: &Value) -> Result<(), Error> {
        let name = CString::new(name)?;
        let text = match value {
            Value::Text(text) => Some(CString::new(text.as_str())?),
            _ => None,
        };
        let name: *const c_char = name.as_ptr();
        let (params, count, room) = (&raw mut self.params, &raw mut self.count, &raw mut self.room);
        // SAFETY: three places of ours that describe one list; the strings outlive the call, which copies them.
        checked(unsafe {
            match (value, &text) {
                (_, Some(text)) => sys::virTypedParamsAddString(params, count, room, name, text.as_ptr()),
                (Value::Signed(value), _) => sys::virTypedParamsAddLLong(params, count, room, name, *value),
                (Value::Float(value), _) => sys::virTypedParamsAddDouble(params, count, room, name, *value),
                (Value::Unsigned(value), _) => {
                    sys::virTypedParamsAddULLong(params, count, room, name, *value)
                }
                (Value::Text(_), None) => 0,
            }
        })
        .map(drop)
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: what libvirt allocated for this list, freed once.
        unsafe { sys::virTypedParamsFree(self.params, self.count) };
    }
}

/// Sends a domain to the libvirt at a URI; returns when that has ended.
pub(super) fn migrate(
    domain: &Domain,
    uri: &str,
    values: &[(&str, Value)],
    flags: c_uint,
) -> Result<(), Error> {
    let uri = CString::new(uri)?;
    let list = List::of(values)?;
    // SAFETY: a live domain, a string and a list that outlive the call.
    checked(unsafe {
        let count = c_uint::try_from(list.count).unwrap_or(0);
        sys::virDomainMigrateToURI3(domain.as_ptr(), uri.as_ptr(), list.params, count, flags)
    })
    .map(drop)
}

/// Limits what is read and written on a disk of a running domain.
pub(super) fn set_block_io_tune(domain: &Domain, disk: &str, values: &[(&str, Value)]) -> Result<(), Error> {
    let disk = CString::new(disk)?;
    let list = List::of(values)?;
    // SAFETY: a live domain, a string and a list that outlive the call.
    checked(unsafe {
        let flags = sys::VIR_DOMAIN_AFFECT_LIVE;
        sys::virDomainSetBlockIoTune(domain.as_ptr(), disk.as_ptr(), list.params, list.count, flags)
    })
    .map(drop)
}

/// Begins to copy a disk of a running domain to what an element `<disk>` says.
pub(super) fn block_copy(domain: &Domain, disk: &str, xml: &str, flags: c_uint) -> Result<(), Error> {
    let (disk, xml) = (CString::new(disk)?, CString::new(xml)?);
    // SAFETY: a live domain, two strings that outlive the call, and no parameters.
    checked(unsafe {
        sys::virDomainBlockCopy(
            domain.as_ptr(),
            disk.as_ptr(),
            xml.as_ptr(),
            ptr::null_mut(),
            0,
            flags,
        )
    })
    .map(drop)
}

/// Ends the copy of a disk; with `VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT` the domain uses the copy from then on.
pub(super) fn end_block_job(domain: &Domain, disk: &str, flags: c_uint) -> Result<(), Error> {
    let disk = CString::new(disk)?;
    // SAFETY: a live domain, and a string that outlives the call.
    checked(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) }).map(drop)
}

/// How far the copy of a disk is: done, and all; `None` where there is none.
pub(super) fn block_job(domain: &Domain, disk: &str) -> Result<Option<(u64, u64)>, Error> {
    let disk = CString::new(disk)?;
    let mut info = sys::virDomainBlockJobInfo {
        type_: 0,
        bandwidth: 0,
        cur: 0,
        end: 0,
    };
    // SAFETY: a live domain, a string that outlives the call, and a place to write to.
    let found =
        checked(unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) })?;
    Ok((found > 0).then_some((info.cur, info.end)))
}
