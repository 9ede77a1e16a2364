//! The world: one heap of events, one generator, hosts that run a machine each.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use weft_core::crypto::Random;
use weft_core::model::{Now, WallMicros};

use crate::disk::Disk;
use crate::faults::Action;
use crate::net::{Net, address_of, host_of};

/// Datagrams a paused host's socket holds; what comes after them is lost, as in a kernel.
const SOCKET_BUFFER: usize = 512;
/// Virtual wall clock at the world's beginning: 2026-01-01.
const WALL_EPOCH: u64 = 1_767_225_600_000_000;

/// A sans-IO machine as the world drives it.
pub trait Machine {
    /// What it wants kept on disk, one atomic batch.
    type Batch;

    /// A datagram came in.
    fn deliver(&mut self, now: Now, from: SocketAddr, bytes: &[u8], fx: &mut Effects<Self::Batch>);
    /// A batch is on disk.
    fn persisted(&mut self, now: Now, id: u64, fx: &mut Effects<Self::Batch>);
    /// Time passed.
    fn expire(&mut self, now: Now, fx: &mut Effects<Self::Batch>);
    /// When to call `expire` next.
    fn deadline(&self) -> Option<Now>;
}

/// What a machine wants done.
pub struct Effects<B> {
    /// Datagrams to send.
    pub sends: Vec<(SocketAddr, Vec<u8>)>,
    /// Batches to keep, each with the number by which it is acknowledged.
    pub persists: Vec<(u64, B)>,
    /// Lines for the trace.
    pub notes: Vec<String>,
}

impl<B> Default for Effects<B> {
    fn default() -> Self {
        Self {
            sends: Vec::new(),
            persists: Vec::new(),
            notes: Vec::new(),
        }
    }
}

/// What a machine is born from.
pub struct Boot<'a, B> {
    /// Which host.
    pub host: usize,
    /// How many times it was started before.
    pub boots: u64,
    /// When.
    pub now: Now,
    /// What the wall clock says.
    pub wall: WallMicros,
    /// Randomness of its own.
    pub random: Random,
    /// What is on disk, oldest first.
    pub disk: &'a [B],
}

/// Makes the machine of a host that starts.
pub type Maker<M> = Box<dyn FnMut(Boot<'_, <M as Machine>::Batch>) -> M>;

/// One host.
pub struct Host<M: Machine> {
    /// The machine; none while the host is off.
    pub machine: Option<M>,
    boots: u64,
    disk: Disk<M::Batch>,
    pauses: u32,
    socket: VecDeque<(SocketAddr, Vec<u8>)>,
    /// Batches that are on disk and not acknowledged, while it is paused.
    synced: VecDeque<u64>,
    wake: Option<Now>,
}

enum Event {
    Deliver {
        to: usize,
        from: SocketAddr,
        bytes: Vec<u8>,
    },
    Wake(usize),
    Synced {
        host: usize,
        boots: u64,
        id: u64,
    },
    Act(Action),
}

/// Everything there is.
pub struct World<M: Machine> {
    /// Virtual time.
    pub now: Now,
    /// The links.
    pub net: Net,
    /// The hosts; host `n` has the address [`address_of`]`(n)`.
    pub hosts: Vec<Host<M>>,
    random: Random,
    maker: Maker<M>,
    events: BTreeMap<(Now, u64), Event>,
    sequence: u64,
    trace: Option<String>,
    notes: bool,
    /// A hash over the whole trace, also when it isn't kept.
    pub fingerprint: u64,
    /// Datagrams that were sent.
    pub datagrams: u64,
    /// Octets that were sent.
    pub octets: u64,
}

impl<M: Machine> Host<M> {
    /// Does it stand still?
    pub fn is_paused(&self) -> bool {
        self.pauses > 0
    }

    /// How many times it was started.
    pub fn boots(&self) -> u64 {
        self.boots
    }
}

impl<M: Machine> World<M> {
    /// A world of `hosts` hosts that are all off.
    pub fn new(seed: u64, hosts: usize, keep_trace: bool, maker: Maker<M>) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_be_bytes());
        let mut random = Random::from_seed(bytes);
        let net = Net::new(hosts, &mut random);
        let off = |_| Host {
            machine: None,
            boots: 0,
            disk: Disk::default(),
            pauses: 0,
            socket: VecDeque::new(),
            synced: VecDeque::new(),
            wake: None,
        };
        Self {
            now: Now::default(),
            net,
            hosts: (0..hosts).map(off).collect(),
            random,
            maker,
            events: BTreeMap::new(),
            sequence: 0,
            trace: keep_trace.then(String::new),
            notes: true,
            fingerprint: 0xcbf2_9ce4_8422_2325,
            datagrams: 0,
            octets: 0,
        }
    }

    /// The world's generator, for scenarios.
    pub fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// Neither trace nor fingerprint from now on: half of the time of a long measurement goes into them.
    pub fn take_no_notes(&mut self) {
        self.notes = false;
    }

    /// The trace, if it is kept.
    pub fn trace(&self) -> &str {
        self.trace.as_deref().unwrap_or_default()
    }

    /// Does something at `at`.
    pub fn schedule(&mut self, at: Now, action: Action) {
        self.push(at, Event::Act(action));
    }

    /// Lets time pass until `until`.
    pub fn run_until(&mut self, until: Now) {
        while let Some(entry) = self.events.first_entry() {
            let at = entry.key().0;
            if at > until {
                break;
            }
            let event = entry.remove();
            self.now = self.now.max(at);
            self.happen(event);
        }
        self.now = self.now.max(until);
    }

    /// Lets time pass.
    pub fn run_for(&mut self, time: Duration) {
        self.run_until(self.now.plus(time));
    }

    /// Hands something to a running machine and carries out what it wants. `None` when the host is off.
    pub fn with<R>(
        &mut self,
        host: usize,
        call: impl FnOnce(&mut M, Now, &mut Effects<M::Batch>) -> R,
    ) -> Option<R> {
        let mut fx = Effects::default();
        let machine = self.hosts[host].machine.as_mut()?;
        let answer = call(machine, self.now, &mut fx);
        self.carry_out(host, fx);
        Some(answer)
    }

    /// Hosts that are on.
    pub fn running(&self) -> impl Iterator<Item = (usize, &M)> {
        let with = |(index, host): (usize, &'_ Host<M>)| (index, host.machine.is_some());
        let on: Vec<usize> = self
            .hosts
            .iter()
            .enumerate()
            .map(with)
            .filter(|(_, on)| *on)
            .map(|(i, _)| i)
            .collect();
        on.into_iter()
            .filter_map(|index| Some((index, self.hosts[index].machine.as_ref()?)))
    }

    /// Adds a line to the trace.
    pub fn note(&mut self, host: usize, line: &str) {
        if !self.notes {
            return;
        }
        let micros = self.now.0.as_micros();
        let line = format!(
            "{:>6}.{:06} {host:>2} {line}\n",
            micros / 1_000_000,
            micros % 1_000_000
        );
        for byte in line.bytes() {
            self.fingerprint = (self.fingerprint ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        if let Some(trace) = &mut self.trace {
            trace.push_str(&line);
        }
    }

    fn push(&mut self, at: Now, event: Event) {
        self.sequence += 1;
        self.events.insert((at, self.sequence), event);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { to, from, bytes } => self.arrive(to, from, bytes),
            Event::Wake(host) => self.wake(host),
            Event::Synced { host, boots, id } => {
                let this = &mut self.hosts[host];
                if this.boots == boots {
                    let ids = this.disk.sync(id);
                    this.synced.extend(ids);
                    self.acknowledge(host);
                }
            }
            Event::Act(action) => self.act(action),
        }
    }

    fn acknowledge(&mut self, host: usize) {
        while self.hosts[host].pauses == 0
            && let Some(id) = self.hosts[host].synced.pop_front()
        {
            self.with(host, |machine, now, fx| machine.persisted(now, id, fx));
        }
    }

    fn arrive(&mut self, to: usize, from: SocketAddr, bytes: Vec<u8>) {
        let host = &mut self.hosts[to];
        if host.machine.is_none() {
            return;
        }
        if host.pauses > 0 {
            if host.socket.len() < SOCKET_BUFFER {
                host.socket.push_back((from, bytes));
            }
            return;
        }
        if self.notes {
            self.note(to, &format!("< {from} {}", describe(&bytes)));
        }
        self.with(to, |machine, now, fx| {
            machine.deliver(now, from, &bytes, fx)
        });
    }

    fn wake(&mut self, host: usize) {
        let now = self.now;
        let this = &mut self.hosts[host];
        if this.pauses > 0 || this.wake != Some(now) {
            return;
        }
        this.wake = None;
        self.with(host, |machine, now, fx| machine.expire(now, fx));
    }

    /// Does something now.
    pub fn act(&mut self, action: Action) {
        self.note(action.host(), &format!("! {action:?}"));
        match action {
            Action::Boot(host) => self.boot(host),
            Action::Crash(host) => {
                let this = &mut self.hosts[host];
                this.machine = None;
                this.socket.clear();
                this.synced.clear();
                this.wake = None;
                this.disk.lose_power(&mut self.random);
            }
            Action::Pause(host) => self.hosts[host].pauses += 1,
            Action::Resume(host) => self.resume(host),
            Action::Block(from, to) => self.net.block(from, to),
            Action::Unblock(from, to) => self.net.unblock(from, to),
            Action::Weather(weather) => self.net.weather = weather,
        }
    }

    fn boot(&mut self, host: usize) {
        let random = self.random.fork();
        let now = self.now;
        let this = &mut self.hosts[host];
        if this.machine.is_some() {
            return;
        }
        let micros = u64::try_from(now.0.as_micros()).unwrap_or(u64::MAX);
        let boot = Boot {
            host,
            boots: this.boots,
            now,
            wall: WallMicros(WALL_EPOCH + micros),
            random,
            disk: this.disk.durable(),
        };
        let machine = (self.maker)(boot);
        this.machine = Some(machine);
        this.boots += 1;
        self.with(host, |machine, now, fx| machine.expire(now, fx));
    }

    fn resume(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        this.pauses = this.pauses.saturating_sub(1);
        if this.pauses > 0 {
            return;
        }
        self.acknowledge(host);
        // Sockets before timers, as the daemon does.
        while let Some((from, bytes)) = self.hosts[host].socket.pop_front() {
            self.arrive(host, from, bytes);
        }
        self.with(host, |machine, now, fx| machine.expire(now, fx));
    }

    fn carry_out(&mut self, host: usize, fx: Effects<M::Batch>) {
        for line in fx.notes {
            self.note(host, &line);
        }
        for (id, batch) in fx.persists {
            let boots = self.hosts[host].boots;
            let takes = Duration::from_micros(200 + self.random.range(5_000));
            self.hosts[host].disk.write(id, batch);
            self.push(self.now.plus(takes), Event::Synced { host, boots, id });
        }
        for (to, bytes) in fx.sends {
            self.transmit(host, to, bytes);
        }
        self.rearm(host);
    }

    fn transmit(&mut self, host: usize, to: SocketAddr, bytes: Vec<u8>) {
        self.datagrams += 1;
        self.octets += bytes.len() as u64;
        if self.notes {
            self.note(host, &format!("> {to} {}", describe(&bytes)));
        }
        let Some(target) = host_of(to).filter(|target| *target < self.hosts.len()) else {
            return;
        };
        for delay in self.net.carry(host, target, &mut self.random) {
            let event = Event::Deliver {
                to: target,
                from: address_of(host),
                bytes: bytes.clone(),
            };
            self.push(self.now.plus(delay), event);
        }
    }

    fn rearm(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        let Some(at) = this.machine.as_ref().and_then(Machine::deadline) else {
            return;
        };
        let at = at.max(self.now);
        if this.wake.is_none_or(|wake| at < wake || wake < self.now) {
            this.wake = Some(at);
            self.push(at, Event::Wake(host));
        }
    }
}

fn describe(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = write!(text, "{:>4} octets {hash:08x}", bytes.len());
    text
}
