//! Maps and programs in the kernel, by bpf(2). All of it belongs to descriptors: what nothing holds any more is gone, and a
//! device that a program is on holds that and its maps.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::resource::{Resource, setrlimit};

use crate::bpf::Instruction;

/// What kind of map it is: linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum MapKind {
    Hash = 1,
    /// Keys are places, four octets, and every one is there.
    Array = 2,
    /// Finds the longest prefix.
    LpmTrie = 11,
}

/// A map, and the longest any of its keys and values may be.
#[derive(Debug)]
pub(crate) struct Map {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

/// A program for the ingress of devices.
#[derive(Debug)]
pub(crate) struct Classifier(OwnedFd);

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP: libc::c_long = 1;
const MAP_UPDATE: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET_INFO: libc::c_long = 15;
/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
/// `BPF_F_NO_PREALLOC`: such a map has no other way.
const NO_PREALLOC: u32 = 1;
/// Octets of what the verifier may say.
const LOG: usize = 1 << 16;
/// It calls nothing that is for the GPL alone.
const LICENSE: &[u8] = b"MIT\0";

#[derive(Default)]
#[repr(C)]
struct CreateMap {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
    inner: u32,
    numa: u32,
    name: [u8; 16],
}

#[derive(Default)]
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Default)]
#[repr(C)]
struct LoadProgram {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_len: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

#[derive(Default)]
#[repr(C)]
struct Info {
    fd: u32,
    len: u32,
    info: u64,
}

/// The first members of `struct bpf_prog_info`.
#[derive(Default)]
#[repr(C)]
struct ProgramInfo {
    kind: u32,
    id: u32,
}

impl Map {
    /// A map that is empty, or full of zeroes.
    pub(crate) fn new(
        kind: MapKind,
        name: &str,
        (key, value): (usize, usize),
        entries: usize,
    ) -> io::Result<Self> {
        let is_trie = kind == MapKind::LpmTrie;
        let mut wanted = CreateMap {
            kind: kind as u32,
            key: length(key)?,
            value: length(value)?,
            // The kernel has no map without room.
            entries: length(entries.max(1))?,
            flags: if is_trie { NO_PREALLOC } else { 0 },
            name: named(name),
            ..CreateMap::default()
        };
        // SAFETY: the structure is the one of this command, and nothing in it points anywhere.
        let made = unsafe { bpf(MAP_CREATE, &mut wanted) };
        Ok(Self {
            fd: descriptor(made?)?,
            key,
            value,
        })
    }

    pub(crate) fn descriptor(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Puts a value in, or replaces the one there.
    pub(crate) fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        if (key.len(), value.len()) != (self.key, self.value) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut element = self.element(key);
        element.value = value.as_ptr() as u64;
        // SAFETY: the kernel reads `self.key` octets of the key and `self.value` of the value; both are just as long, as was
        // asked above, and live until the call is over.
        unsafe { bpf(MAP_UPDATE, &mut element) }.map(drop)
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &[u8]) -> io::Result<Vec<u8>> {
        if key.len() != self.key {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // The kernel writes values in units of eight octets.
        let mut value = vec![0; self.value.next_multiple_of(8)];
        let mut element = self.element(key);
        element.value = value.as_mut_ptr() as u64;
        // SAFETY: the kernel reads `self.key` octets of the key and writes no more than `self.value`, rounded up to eight; both
        // are as long and live until the call is over.
        unsafe { bpf(MAP_LOOKUP, &mut element) }?;
        value.truncate(self.value);
        Ok(value)
    }

    fn element(&self, key: &[u8]) -> Element {
        Element {
            map: self.fd.as_raw_fd() as u32,
            key: key.as_ptr() as u64,
            ..Element::default()
        }
    }
}

impl Classifier {
    /// Has the kernel check and translate it. The maps that it names must be open.
    pub(crate) fn load(name: &str, instructions: &[Instruction]) -> io::Result<Self> {
        let mut program = LoadProgram {
            kind: SCHED_CLS,
            count: length(instructions.len())?,
            instructions: instructions.as_ptr() as u64,
            license: LICENSE.as_ptr() as u64,
            name: named(name),
            ..LoadProgram::default()
        };
        // SAFETY: the kernel reads `count` instructions and a text that ends in zero; both live until the call is over.
        let loaded = unsafe { bpf(PROG_LOAD, &mut program) };
        loaded.and_then(descriptor).map(Self).map_err(|error| {
            let why = complaint(&mut program);
            io::Error::new(error.kind(), format!("{error}: {why}"))
        })
    }

    pub(crate) fn descriptor(&self) -> u32 {
        self.0.as_raw_fd() as u32
    }

    /// The kernel's number for it.
    pub(crate) fn id(&self) -> io::Result<u32> {
        let mut info = ProgramInfo::default();
        let mut wanted = Info {
            fd: self.descriptor(),
            len: size_of::<ProgramInfo>() as u32,
            info: (&raw mut info) as u64,
        };
        // SAFETY: the kernel writes no more than `len` octets to `info`, which lives until the call is over.
        unsafe { bpf(OBJ_GET_INFO, &mut wanted) }?;
        Ok(info.id)
    }
}

#[cfg(test)]
impl Classifier {
    /// Lets it look at a packet as if that had come to a device, by default an empty namespace's `lo`: its verdict, and what it
    /// made of the packet.
    pub(crate) fn try_on(&self, packet: &[u8]) -> (i32, Vec<u8>) {
        self.try_on_super(packet, 0)
    }

    /// The same with a super-packet, whose segments have so much payload each.
    pub(crate) fn try_on_super(&self, packet: &[u8], segment: u32) -> (i32, Vec<u8>) {
        let mut context = [0_u32; CONTEXT / 4];
        context[Context::SegmentSize as usize / 4] = segment;
        let mut out = vec![0_u8; packet.len() + 256];
        let mut test = TestRun {
            program: self.descriptor(),
            len: packet.len() as u32,
            len_out: out.len() as u32,
            data: packet.as_ptr() as u64,
            data_out: out.as_mut_ptr() as u64,
            context_len: CONTEXT as u32,
            context: context.as_ptr() as u64,
            ..TestRun::default()
        };
        // SAFETY: the kernel reads `len` octets of the packet and `context_len` behind `context`, and writes no more than
        // `len_out` behind `data_out`; all live until the call is over.
        unsafe { bpf(PROG_TEST_RUN, &mut test) }.expect("these tests need root");
        out.truncate(test.len_out as usize);
        (test.verdict as i32, out)
    }
}

#[cfg(test)]
use crate::bpf::Context;

#[cfg(test)]
const PROG_TEST_RUN: libc::c_long = 10;

#[cfg(test)]
#[derive(Default)]
#[repr(C)]
struct TestRun {
    program: u32,
    verdict: u32,
    len: u32,
    len_out: u32,
    data: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_len: u32,
    context_len_out: u32,
    context: u64,
    context_out: u64,
}

/// Octets of `struct __sk_buff` up to what tests say.
#[cfg(test)]
const CONTEXT: usize = Context::SegmentSize as usize + 4;

/// What the verifier says to a program that was refused: its last words.
fn complaint(program: &mut LoadProgram) -> String {
    let mut log = vec![0_u8; LOG];
    program.log_level = 1;
    program.log_len = LOG as u32;
    program.log = log.as_mut_ptr() as u64;
    // SAFETY: as for the first time, and the kernel writes no more than `log_len` octets to the log, which is as long.
    let again = unsafe { bpf(PROG_LOAD, program) };
    if let Ok(fd) = again {
        drop(descriptor(fd));
    }
    let text = String::from_utf8_lossy(&log);
    let lines = text.trim_end_matches('\0').lines();
    let said: Vec<&str> = lines
        .filter(|line| !line.starts_with("processed"))
        .collect();
    said[said.len().saturating_sub(4)..].join("; ")
}

/// # Safety
/// `attributes` is laid out as `command` asks, and what it points to lives until the call is over.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    let mut call = || {
        let at = std::ptr::from_mut(attributes);
        // SAFETY: the caller's promise; the length is that of what is pointed to.
        match unsafe { libc::syscall(libc::SYS_bpf, command, at, size_of::<T>()) } {
            -1 => Err(io::Error::last_os_error()),
            answer => Ok(answer),
        }
    };
    match call() {
        // Before Linux 5.11 maps count as locked memory, of which a process may have little.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && command != MAP_LOOKUP => {
            let all = libc::RLIM_INFINITY;
            setrlimit(Resource::RLIMIT_MEMLOCK, all, all)?;
            call()
        }
        other => other,
    }
}

fn descriptor(answer: libc::c_long) -> io::Result<OwnedFd> {
    let fd = libc::c_int::try_from(answer).map_err(io::Error::other)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn length(count: usize) -> io::Result<u32> {
    u32::try_from(count).map_err(io::Error::other)
}

/// At most 15 octets, as shown by `bpftool`.
fn named(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    for (to, from) in out.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    out
}
