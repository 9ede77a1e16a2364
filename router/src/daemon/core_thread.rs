//! The thread that owns the [`Node`]: inputs in, effects out, and nothing here that blocks for long, because gossip
//! runs on it and a node that is late counts as dead.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};
use weft_carrier::{Carrier, CarrierEvent, PeerEntry, PeerTable, VxlanProbes};
use weft_core::carriers::{Devices, EspState};
use weft_core::model::{Now, Proto, WallMicros};
use weft_core::node::{Command, CommandError, Input, JoinFailure, Node, Output, Reply};
use weft_core::view::{PeerNumber, PeerView, View};

use super::disk::Disk;

/// Messages that may wait for the core. Beyond that packets' events are dropped (they are repeated) and callers wait.
const QUEUE: usize = 8192;
/// Messages taken before timers are looked at: sockets are drained first, so that a late wake-up of this thread does
/// not look like everybody else's silence.
const DRAIN: usize = 1024;
/// How often the wall clock and the paths' MTU are read anew.
const HOUSEKEEPING: Duration = Duration::from_secs(2);

/// A wall clock further than this from where it should be has jumped.
const JUMP: Duration = Duration::from_secs(5);

/// Batches with these numbers are the daemon's own; the core's count up from 1 and never get here.
pub(crate) const OWN_ROWS: u64 = 1 << 63;

/// What the core thread is told.
pub(crate) enum Message {
    /// From the carrier.
    Carrier(CarrierEvent),
    /// The disk's mark has moved: look at it.
    Durable,
    /// From the API.
    Command(Command, oneshot::Sender<Result<Reply, CommandError>>),
    /// The answer of [`Notice::CheckPublish`].
    PublishChecked(u64, Option<String>),
    /// Published ports that can't be served here.
    Conflicts(Vec<(Proto, u16, String)>),
    /// The host's addresses.
    HostAddrs(Vec<IpAddr>, Vec<SocketAddr>),
    /// The `vxlan` carrier's devices that are up behind their filter, and what sends their probes; or why they are not.
    Vxlan(Devices<Arc<VxlanProbes>>),
    /// What the kernel has of the keys for ESP.
    Esp(EspState),
    /// ESP of this peer's came inside UDP from another port than was known.
    EspPort(PeerNumber, (IpAddr, u16)),
    /// A probe came over it: whose it says it is, and its nonce.
    VxlanProbe([u8; 6], u64),
    /// What `weft peers` shows.
    Peers(oneshot::Sender<Vec<PeerView>>),
    /// Tell the peers and stop.
    Leave,
    /// Stop at once.
    Stop,
}

/// What the rest of the daemon is told.
pub(crate) enum Notice {
    /// Member, and may allocate.
    Ready,
    /// The join failed.
    JoinFailed(JoinFailure),
    /// Are these ports free?
    CheckPublish(u64, Vec<(Proto, Option<IpAddr>, u16)>),
    /// The peers were told.
    Left,
    /// The daemon can't go on.
    Fatal(String),
}

/// Handle to the thread.
#[derive(Clone)]
pub(crate) struct Core {
    queue: SyncSender<Message>,
    view: watch::Receiver<Option<Arc<View>>>,
    dropped: Arc<AtomicU64>,
    alarms: Arc<Mutex<Vec<String>>>,
}

/// The receiving end, made before the thread so that carrier and disk can be given senders first.
pub(crate) struct Inbox {
    queue: SyncSender<Message>,
    messages: Receiver<Message>,
    mark: Arc<Mark>,
}

/// How far the disk is. The core's batches are numbered from 1 without a gap and written in that order.
#[derive(Default)]
struct Mark {
    highest: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl Mark {
    fn lock_failure(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    /// An empty one.
    pub(crate) fn new() -> Self {
        let (queue, messages) = sync_channel(QUEUE);
        Self {
            queue,
            messages,
            mark: Arc::default(),
        }
    }

    /// What the disk thread calls. It never waits for the core, which may be waiting for the disk: the mark says what is
    /// durable, and the message only wakes a core that sleeps.
    pub(crate) fn durable(&self) -> impl Fn(anyhow::Result<u64>) + Send + 'static {
        let (queue, mark) = (self.queue.clone(), self.mark.clone());
        move |outcome| {
            match outcome {
                // The daemon's own rows: nobody waits for them.
                Ok(id) if id >= OWN_ROWS => return,
                Ok(id) => drop(mark.highest.fetch_max(id, Ordering::AcqRel)),
                Err(error) => *mark.lock_failure() = Some(format!("{error:#}")),
            }
            let _ = queue.try_send(Message::Durable);
        }
    }

    /// A sender for the carrier's threads, which never wait: a full queue drops.
    pub(crate) fn carrier(&self) -> Box<dyn Fn(CarrierEvent) + Send + Sync> {
        let queue = self.queue.clone();
        Box::new(move |event| match queue.try_send(Message::Carrier(event)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) | Err(TrySendError::Full(_)) => {}
        })
    }
}

impl Core {
    /// Starts the thread around `node`.
    pub(crate) fn start(
        inbox: Inbox,
        node: Node,
        clock: Clock,
        disk: Arc<Disk>,
        carrier: Arc<Carrier>,
        notices: mpsc::UnboundedSender<Notice>,
    ) -> anyhow::Result<(Self, std::thread::JoinHandle<()>)> {
        let (view_sender, view) = watch::channel(None);
        let alarms = Arc::new(Mutex::new(Vec::new()));
        let core = Self {
            queue: inbox.queue,
            view,
            dropped: Arc::default(),
            alarms: alarms.clone(),
        };
        let worker = Worker {
            node,
            clock,
            disk,
            carrier,
            notices,
            view: view_sender,
            replies: BTreeMap::new(),
            next_reply: 0,
            alarms,
            clocks: (clock.now(), Clock::wall()),
            mark: inbox.mark,
            acknowledged: 0,
            probes: Devices::default(),
        };
        let thread = std::thread::Builder::new()
            .name("weft-core".to_owned())
            .spawn(move || worker.run(&inbox.messages))?;
        Ok((core, thread))
    }

    /// The newest view; `None` before the node is a member.
    pub(crate) fn view(&self) -> Option<Arc<View>> {
        self.view.borrow().clone()
    }

    /// To wait for changes of the view.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Arc<View>>> {
        self.view.clone()
    }

    /// Asks the node for something.
    pub(crate) async fn command(&self, command: Command) -> Result<Reply, CommandError> {
        let (sender, answer) = oneshot::channel();
        self.tell(Message::Command(command, sender));
        answer.await.unwrap_or_else(|_| {
            Err(CommandError {
                kind: weft_core::control::ErrorKind::Unavailable,
                text: "the daemon is stopping; try again once it is up".to_owned(),
            })
        })
    }

    /// What `weft peers` shows.
    pub(crate) async fn peers(&self) -> Vec<PeerView> {
        let (sender, answer) = oneshot::channel();
        self.tell(Message::Peers(sender));
        answer.await.unwrap_or_default()
    }

    /// Queues a message.
    pub(crate) fn tell(&self, message: Message) {
        if self.queue.try_send(message).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Things that a person must know, newest last.
    pub(crate) fn alarms(&self) -> Vec<String> {
        self.alarms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Turns the machine's clocks into the core's.
#[derive(Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    /// Time starts now.
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(self) -> Now {
        Now(self.0.elapsed())
    }

    /// Microseconds since the Unix epoch.
    pub(crate) fn wall() -> WallMicros {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        WallMicros(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

struct Worker {
    node: Node,
    clock: Clock,
    disk: Arc<Disk>,
    carrier: Arc<Carrier>,
    notices: mpsc::UnboundedSender<Notice>,
    view: watch::Sender<Option<Arc<View>>>,
    replies: BTreeMap<u64, oneshot::Sender<Result<Reply, CommandError>>>,
    next_reply: u64,
    alarms: Arc<Mutex<Vec<String>>>,
    /// The last readings of both clocks.
    clocks: (Now, WallMicros),
    mark: Arc<Mark>,
    /// Batches up to here are known to be durable.
    acknowledged: u64,
    probes: Devices<Arc<VxlanProbes>>,
}

impl Worker {
    fn run(mut self, messages: &Receiver<Message>) {
        let mut housekeeping = Now::default();
        let mut out = Vec::new();
        self.node.start(self.clock.now(), Clock::wall(), &mut out);
        self.perform(&mut out);
        loop {
            let now = self.clock.now();
            if now >= housekeeping {
                housekeeping = now.plus(HOUSEKEEPING);
                self.keep_house(now, &mut out);
            }
            let wake = self
                .node
                .deadline()
                .map_or(housekeeping, |deadline| deadline.min(housekeeping));
            match messages.recv_timeout(wake.since(now)) {
                Ok(first) => {
                    if !self.take(first, messages, &mut out) {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.acknowledge(&mut out);
            self.node.expire(self.clock.now(), &mut out);
            self.perform(&mut out);
        }
    }

    /// Tells the node what has become durable since the last look.
    fn acknowledge(&mut self, out: &mut Vec<Output>) {
        if let Some(error) = self.mark.lock_failure().take() {
            self.fatal(format!("can't write to the state directory: {error}"));
        }
        while self.acknowledged < self.mark.highest.load(Ordering::Acquire) {
            self.acknowledged += 1;
            let input = Input::Persisted(self.acknowledged);
            self.node.handle(self.clock.now(), input, out);
            self.perform(out);
        }
    }

    /// Handles `first` and what else waits; false when the thread is to end.
    fn take(
        &mut self,
        first: Message,
        messages: &Receiver<Message>,
        out: &mut Vec<Output>,
    ) -> bool {
        let mut next = Some(first);
        for _ in 0..DRAIN {
            let Some(message) = next else { break };
            if matches!(message, Message::Stop) {
                return false;
            }
            self.handle(message, out);
            self.perform(out);
            next = messages.try_recv().ok();
        }
        if let Some(message) = next {
            self.handle(message, out);
        }
        true
    }

    fn handle(&mut self, message: Message, out: &mut Vec<Output>) {
        let now = self.clock.now();
        match message {
            Message::Carrier(event) => self.handle_carrier(now, event, out),
            // `run` looks at the mark after every round.
            Message::Durable => {}
            Message::Command(command, answer) => {
                self.next_reply += 1;
                self.replies.insert(self.next_reply, answer);
                self.node
                    .handle(now, Input::Command(self.next_reply, command), out);
            }
            Message::PublishChecked(ask, owner) => {
                self.node
                    .handle(now, Input::PublishChecked { ask, owner }, out);
            }
            Message::Conflicts(list) => self.node.handle(now, Input::Conflicts(list), out),
            Message::HostAddrs(host, underlay) => {
                self.node
                    .handle(now, Input::HostAddrs { host, underlay }, out)
            }
            Message::Vxlan(devices) => {
                let input = Input::VxlanDevices(devices.states());
                self.probes = devices;
                self.node.handle(now, input, out);
            }
            Message::Esp(state) => self.node.handle(now, Input::Esp(state), out),
            Message::EspPort(peer, from) => {
                self.node.handle(now, Input::EspPort { peer, from }, out);
            }
            Message::VxlanProbe(from, nonce) => {
                self.node
                    .handle(now, Input::VxlanProbe { from, nonce }, out);
            }
            Message::Peers(answer) => drop(answer.send(self.node.peers(now))),
            Message::Leave => self.node.handle(now, Input::Leave, out),
            Message::Stop => {}
        }
    }

    fn handle_carrier(&mut self, now: Now, event: CarrierEvent, out: &mut Vec<Output>) {
        match event {
            CarrierEvent::Handshake { from, mut bytes } => {
                self.node.handle(
                    now,
                    Input::Datagram {
                        from,
                        bytes: &mut bytes,
                    },
                    out,
                );
            }
            CarrierEvent::Frame {
                local_index,
                from,
                kind,
                body,
            } => {
                self.node.handle(
                    now,
                    Input::Opened {
                        local_index,
                        from,
                        kind,
                        body: &body,
                    },
                    out,
                );
            }
            CarrierEvent::TooBig { to, .. } => {
                if let Some(mtu) = self.carrier.path_mtu(to) {
                    self.node.handle(now, Input::PathMtu { addr: to, mtu }, out);
                }
            }
            CarrierEvent::ConnectionLost(with) => {
                self.node.handle(now, Input::ConnectionLost(with), out);
            }
            CarrierEvent::TapLost => {
                self.fatal("the mesh's TAP device was removed by somebody; start again".to_owned())
            }
            CarrierEvent::Wanted(number) => self.node.handle(now, Input::Wanted(number), out),
            CarrierEvent::Moved { local_index, from } => {
                self.node
                    .handle(now, Input::Moved { local_index, from }, out);
            }
        }
    }

    fn keep_house(&mut self, now: Now, out: &mut Vec<Output>) {
        let wall = Clock::wall();
        self.notice_jump(now, wall, out);
        self.node.handle(now, Input::Wall(wall), out);
        self.measure_paths(now, out);
        self.perform(out);
    }

    /// A wall clock that jumps against the monotonic one is what a resumed snapshot sees. Two copies of one memory
    /// would seal under the same nonces, so keys go even where it was only somebody setting the clock.
    fn notice_jump(&mut self, now: Now, wall: WallMicros, out: &mut Vec<Output>) {
        let (last_now, last_wall) = std::mem::replace(&mut self.clocks, (now, wall));
        let passed = u64::try_from(now.since(last_now).as_micros()).unwrap_or(u64::MAX);
        let jump = Duration::from_micros(wall.0.abs_diff(last_wall.0.saturating_add(passed)));
        if jump <= JUMP {
            return;
        }
        info!(
            seconds = jump.as_secs(),
            "the clock jumped; all tunnels get new keys"
        );
        match super::start::os_seed() {
            Ok(seed) => self.node.handle(now, Input::Snapshot(seed), out),
            Err(error) => self.fatal(format!("no randomness for new keys: {error:#}")),
        }
    }

    fn measure_paths(&mut self, now: Now, out: &mut Vec<Output>) {
        self.carrier.follow_routes();
        let paths: Vec<SocketAddr> = self
            .node
            .tunnels()
            .iter()
            .filter_map(|tunnel| tunnel.path?.udp())
            .collect();
        for addr in paths {
            if let Some(mtu) = self.carrier.path_mtu(addr) {
                self.node.handle(now, Input::PathMtu { addr, mtu }, out);
            }
            if let Some(source) = self.carrier.path_source(addr) {
                let input = Input::PathSource { addr, source };
                self.node.handle(now, input, out);
            }
        }
    }

    fn perform(&mut self, out: &mut Vec<Output>) {
        let tunnels = out.iter().any(|output| matches!(output, Output::Tunnels));
        if tunnels {
            // Before anything is sent: what answers it comes for sessions that the carrier must know by then.
            self.publish_tunnels();
        }
        let mut view = false;
        let mut replies = Vec::new();
        let mut notices = Vec::new();
        for output in out.drain(..) {
            match output {
                // A datagram that the kernel refuses is a lost datagram; the sender's timers deal with it.
                Output::Send { to, datagram } => drop(self.carrier.send(to, &datagram)),
                Output::VxlanProbe {
                    host,
                    to,
                    from,
                    nonce,
                    length,
                } => {
                    // Like any other: one that can't be sent is lost.
                    let probes = self.probes.to(host).as_ref();
                    drop(probes.map(|probes| probes.send(to, from, nonce, usize::from(length))));
                }
                Output::Persist(id, batch) => self.disk.write(id, batch),
                Output::Tunnels => {}
                Output::View => view = true,
                Output::Reply(id, answer) => replies.push((id, answer)),
                Output::CheckPublish { ask, ports } => {
                    notices.push(Notice::CheckPublish(ask, ports))
                }
                Output::Ready => notices.push(Notice::Ready),
                Output::JoinFailed(why) => notices.push(Notice::JoinFailed(why)),
                Output::Alarm(text) => self.alarm(text),
                Output::Left => notices.push(Notice::Left),
            }
        }
        if tunnels {
            self.measure_paths(self.clock.now(), out);
        }
        if tunnels || view {
            self.view.send_replace(self.node.view().map(Arc::new));
        }
        // Answers and notices go last: whoever gets one finds the view already changed.
        notices.into_iter().for_each(|notice| self.notify(notice));
        for (id, answer) in replies {
            if let Some(waiting) = self.replies.remove(&id) {
                let _ = waiting.send(answer);
            }
        }
        if !out.is_empty() {
            self.perform(out);
        }
    }

    fn publish_tunnels(&self) {
        let Some(plan) = self.node.plan() else { return };
        let tunnels = self.node.tunnels();
        let receivers = tunnels
            .iter()
            .flat_map(|tunnel| tunnel.receivers.iter().cloned())
            .collect();
        let peers = tunnels
            .into_iter()
            .map(|tunnel| PeerEntry {
                number: tunnel.number,
                id: tunnel.peer,
                transport: tunnel.transport,
                path: tunnel.path,
                prefixes: tunnel.prefixes,
                mtu: tunnel.mtu,
            })
            .collect();
        self.carrier.set_table(PeerTable {
            me: self.node.id(),
            relays: self.node.relays(),
            plan,
            peers,
            receivers,
            guests: self.node.guests(),
            guard: self.node.guard(),
        });
    }

    fn notify(&self, notice: Notice) {
        // Fails only while the daemon stops.
        let _ = self.notices.send(notice);
    }

    fn alarm(&self, text: String) {
        warn!(alarm = %text);
        let mut alarms = self.alarms.lock().unwrap_or_else(PoisonError::into_inner);
        if alarms.len() >= 32 {
            alarms.remove(0);
        }
        alarms.push(text);
    }

    fn fatal(&self, text: String) {
        error!("{text}");
        info!("stopping: what can't be kept on disk can't be promised to others");
        self.notify(Notice::Fatal(text));
    }
}
