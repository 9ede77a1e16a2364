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

/// What a wall clock shows that is right.
pub fn true_wall(now: Now) -> WallMicros {
    WallMicros(WALL_EPOCH + u64::try_from(now.0.as_micros()).unwrap_or(u64::MAX))
}

/// A sans-IO machine as the world drives it.
pub trait Machine {
    /// What it wants kept on disk, one atomic batch.
    type Batch: Clone;

    /// A datagram came in.
    fn deliver(
        &mut self,
        now: Now,
        from: SocketAddr,
        bytes: &mut [u8],
        fx: &mut Effects<Self::Batch>,
    );
    /// A batch is on disk.
    fn persisted(&mut self, now: Now, id: u64, fx: &mut Effects<Self::Batch>);
    /// Time passed.
    fn expire(&mut self, now: Now, fx: &mut Effects<Self::Batch>);
    /// When to call `expire` next.
    fn deadline(&self) -> Option<Now>;
    /// The wall clock was set by so many microseconds.
    fn set_clock(&mut self, _now: Now, _micros: i64, _fx: &mut Effects<Self::Batch>) {}
    /// It is told to go.
    fn leave(&mut self, _now: Now, _fx: &mut Effects<Self::Batch>) {}
    /// It says what it should not.
    fn deviate(&mut self, _now: Now, _what: Strange, _fx: &mut Effects<Self::Batch>) {}
}

/// How a machine says what it should not. The numbers are for it to choose by.
#[derive(Clone, Copy, Debug)]
pub enum Strange {
    /// As a later version might.
    Newer(u64),
    /// What is not so.
    Lie(u64),
    /// Two roster records under one number.
    Fork,
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
    /// Whose key it has: the host's that it is or is a copy of, and how often that lost its disk.
    pub key: Key,
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

/// Which key a host has: of which host, and how often that host lost its disk before.
pub type Key = (usize, u64);

/// Makes the machine of a host that starts.
pub type Maker<M> = Box<dyn FnMut(Boot<'_, <M as Machine>::Batch>) -> M>;

/// One host.
pub struct Host<M: Machine> {
    /// The machine; none while the host is off.
    pub machine: Option<M>,
    boots: u64,
    key: Key,
    disk: Disk<M::Batch>,
    /// How much of the disk is in the backup.
    backup: usize,
    /// How many times the disk was what it had been before.
    turns: u64,
    /// By so much its wall clock is wrong, microseconds.
    clock: i64,
    /// Its next write is its last.
    doomed: bool,
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
    /// Hosts that did something since they were last asked for, and what happened to which.
    touched: Vec<usize>,
    /// Hosts that stand still no more, with a socket that they have not read yet.
    catching_up: VecDeque<usize>,
    acted: Vec<Action>,
    /// The largest datagram that was sent.
    pub largest: usize,
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

    /// What is on its disk.
    pub fn disk(&self) -> &[M::Batch] {
        self.disk.durable()
    }

    /// How many times its disk was what it had been before.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Whose key it has.
    pub fn key(&self) -> Key {
        self.key
    }

    /// By so much its wall clock is wrong, microseconds.
    pub fn clock(&self) -> i64 {
        self.clock
    }

    fn lose_power(&mut self, random: &mut Random) {
        self.machine = None;
        self.socket.clear();
        self.synced.clear();
        self.wake = None;
        self.disk.lose_power(random);
    }
}

impl<M: Machine> World<M> {
    /// A world of `hosts` hosts that are all off.
    pub fn new(seed: u64, hosts: usize, keep_trace: bool, maker: Maker<M>) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_be_bytes());
        let mut random = Random::from_seed(bytes);
        let net = Net::new(hosts, &mut random);
        let off = |host| Host {
            machine: None,
            boots: 0,
            key: (host, 0),
            disk: Disk::default(),
            backup: 0,
            turns: 0,
            clock: 0,
            doomed: false,
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
            touched: Vec::new(),
            catching_up: VecDeque::new(),
            acted: Vec::new(),
            largest: 0,
            fingerprint: 0xcbf2_9ce4_8422_2325,
            datagrams: 0,
            octets: 0,
        }
    }

    /// The world's generator, for scenarios.
    pub fn random(&mut self) -> &mut Random {
        &mut self.random
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
        while self.step(until) {
            self.touched.clear();
            self.acted.clear();
        }
    }

    /// Lets time pass until the next event has happened; false when there is none until `until`, which it is then.
    pub fn step(&mut self, until: Now) -> bool {
        if let Some(host) = self.catching_up.front() {
            self.catch_up(*host);
            return true;
        }
        let due = self
            .events
            .first_entry()
            .filter(|entry| entry.key().0 <= until);
        let Some(entry) = due else {
            self.now = self.now.max(until);
            return false;
        };
        self.now = self.now.max(entry.key().0);
        let event = entry.remove();
        self.happen(event);
        true
    }

    /// Hosts that did something since this was last asked.
    pub fn take_touched(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.touched)
    }

    /// What was done to hosts and links since this was last asked.
    pub fn take_acted(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.acted)
    }

    /// Neither trace nor fingerprint from now on: half of the time of a long measurement goes into them.
    pub fn take_no_notes(&mut self) {
        self.notes = false;
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
        self.mark(&[self.now.0.as_micros() as u64, host as u64]);
        self.mark_bytes(line.as_bytes());
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            write_line(trace, now, host, format_args!("{line}"));
        }
    }

    /// The same for a datagram, whose line is made only when somebody will read it.
    fn note_datagram(&mut self, host: usize, way: char, other: SocketAddr, bytes: &[u8]) {
        if !self.notes {
            return;
        }
        let peer = host_of(other).map_or(u64::MAX, |peer| peer as u64);
        let length = bytes.len() as u64;
        let micros = self.now.0.as_micros() as u64;
        self.mark(&[micros, host as u64, way as u64, peer, length]);
        self.mark_bytes(bytes);
        let (now, hash) = (self.now, self.fingerprint as u32);
        if let Some(trace) = &mut self.trace {
            let line = format_args!("{way} {other} {length:>4} octets {hash:08x}");
            write_line(trace, now, host, line);
        }
    }

    fn mark(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.fingerprint = (self.fingerprint ^ number)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(23);
        }
    }

    fn mark_bytes(&mut self, bytes: &[u8]) {
        let (chunks, rest) = bytes.as_chunks::<8>();
        for chunk in chunks {
            self.mark(&[u64::from_le_bytes(*chunk)]);
        }
        self.mark(&[rest.iter().fold(1, |sum, byte| sum << 8 | u64::from(*byte))]);
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

    fn arrive(&mut self, to: usize, from: SocketAddr, mut bytes: Vec<u8>) {
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
        self.note_datagram(to, '<', from, &bytes);
        self.with(to, |machine, now, fx| {
            machine.deliver(now, from, &mut bytes, fx)
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
        self.acted.push(action);
        match action {
            Action::Boot(host) => self.boot(host),
            Action::Crash(host) => self.hosts[host].lose_power(&mut self.random),
            Action::CrashAtWrite(host) => self.hosts[host].doomed = true,
            Action::Leave(host) => self.tell(host, |machine, now, fx| machine.leave(now, fx)),
            Action::Wipe(host) => {
                let this = &mut self.hosts[host];
                this.lose_power(&mut self.random);
                this.disk = Disk::default();
                this.backup = 0;
                this.key.1 += 1;
            }
            // What people do, not the world.
            Action::Remove(_) | Action::Force(_) => {}
            Action::Backup(host) => self.hosts[host].backup = self.hosts[host].disk.mark(),
            Action::Restore(host) => {
                let this = &mut self.hosts[host];
                this.lose_power(&mut self.random);
                // There is a backup, unless the host has become somebody else since.
                if this.backup > 0 {
                    this.disk.turn_back(this.backup);
                    this.turns += 1;
                }
            }
            Action::Clone(host, copy) => self.copy(host, copy),
            Action::Unclone(host, copy) => {
                self.hosts[copy].lose_power(&mut self.random);
                self.hosts[copy].disk = Disk::default();
                self.hosts[host].lose_power(&mut self.random);
                self.boot(host);
            }
            Action::Clock(host, micros) => {
                self.hosts[host].clock += micros;
                self.tell(host, |machine, now, fx| machine.set_clock(now, micros, fx));
            }
            Action::Pause(host) => self.hosts[host].pauses += 1,
            Action::Resume(host) => self.resume(host),
            Action::Block(from, to) => self.net.block(from, to),
            Action::Unblock(from, to) => self.net.unblock(from, to),
            Action::Weather(weather) => self.net.weather = weather,
            Action::Newer(host) => self.deviate(host, Strange::Newer),
            Action::Lie(host) => self.deviate(host, Strange::Lie),
            Action::Fork(host) => self.deviate(host, |_| Strange::Fork),
        }
    }

    fn tell(&mut self, host: usize, call: impl FnOnce(&mut M, Now, &mut Effects<M::Batch>)) {
        self.with(host, call);
    }

    fn deviate(&mut self, host: usize, how: impl Fn(u64) -> Strange) {
        let what = how(self.random.u64());
        self.tell(host, |machine, now, fx| machine.deviate(now, what, fx));
    }

    fn copy(&mut self, host: usize, copy: usize) {
        let (disk, key) = (self.hosts[host].disk.clone(), self.hosts[host].key);
        let to = &mut self.hosts[copy];
        to.lose_power(&mut self.random);
        (to.disk, to.key) = (disk, key);
        to.disk.lose_power(&mut self.random);
        self.boot(copy);
    }

    /// Whose next write would be the last crashes now: nothing goes wrong any more afterwards.
    pub fn carry_out_crashes(&mut self) {
        for host in 0..self.hosts.len() {
            if std::mem::take(&mut self.hosts[host].doomed) {
                self.act(Action::Crash(host));
            }
        }
    }

    fn boot(&mut self, host: usize) {
        let random = self.random.fork();
        let now = self.now;
        let this = &mut self.hosts[host];
        this.doomed = false;
        if this.machine.is_some() {
            return;
        }
        let boot = Boot {
            host,
            key: this.key,
            boots: this.boots,
            now,
            wall: WallMicros(true_wall(now).0.saturating_add_signed(this.clock)),
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
        self.catching_up.push_back(host);
    }

    /// One thing of those that came while a host stood still, at the very time it goes on but each on its own: who looks
    /// after every step sees what it knew when it did something. Sockets before timers, as the daemon does.
    fn catch_up(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        if this.pauses > 0 {
            self.catching_up.pop_front();
        } else if let Some(id) = this.synced.pop_front() {
            self.with(host, |machine, now, fx| machine.persisted(now, id, fx));
        } else if let Some((from, bytes)) = this.socket.pop_front() {
            self.arrive(host, from, bytes);
        } else {
            self.catching_up.pop_front();
            self.with(host, |machine, now, fx| machine.expire(now, fx));
        }
    }

    fn carry_out(&mut self, host: usize, fx: Effects<M::Batch>) {
        if self.touched.last() != Some(&host) {
            self.touched.push(host);
        }
        for line in fx.notes {
            self.note(host, &line);
        }
        let writes = !fx.persists.is_empty();
        for (id, batch) in fx.persists {
            let boots = self.hosts[host].boots;
            let takes = Duration::from_micros(200 + self.random.range(5_000));
            self.hosts[host].disk.write(id, batch);
            self.push(self.now.plus(takes), Event::Synced { host, boots, id });
        }
        for (to, bytes) in fx.sends {
            self.transmit(host, to, bytes);
        }
        if writes && std::mem::take(&mut self.hosts[host].doomed) {
            // What it has sent and answered by now was heard.
            self.push(self.now, Event::Act(Action::Crash(host)));
            return;
        }
        self.rearm(host);
    }

    fn transmit(&mut self, host: usize, to: SocketAddr, bytes: Vec<u8>) {
        self.datagrams += 1;
        self.octets += bytes.len() as u64;
        self.largest = self.largest.max(bytes.len());
        self.note_datagram(host, '>', to, &bytes);
        let Some(target) = host_of(to).filter(|target| *target < self.hosts.len()) else {
            return;
        };
        let mut delays = self.net.carry(host, target, &mut self.random);
        let last = delays.pop();
        let deliver = |bytes| Event::Deliver {
            to: target,
            from: address_of(host),
            bytes,
        };
        for delay in delays {
            self.push(self.now.plus(delay), deliver(bytes.clone()));
        }
        if let Some(delay) = last {
            self.push(self.now.plus(delay), deliver(bytes));
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

fn write_line(trace: &mut String, now: Now, host: usize, line: std::fmt::Arguments<'_>) {
    let micros = now.0.as_micros();
    let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
    // Writing to a string can't fail.
    let _ = writeln!(trace, "{seconds:>6}.{micros:06} {host:>2} {line}");
}
