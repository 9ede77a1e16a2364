//! Two hosts that found a cluster, join it, and say all they have to say: what they put on the wire and on their disks
//! is where seeds come from, and the first host's disk is where many a target begins.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::LazyLock;
use std::time::Duration;

use weft_core::control::{NameSpec, NetworkSpec, ServiceSpec, TokenRequest};
use weft_core::crypto::{Cipher, Random, Secret};
use weft_core::fuzz::{Between, Half};
use weft_core::identity::Identity;
use weft_core::model::{AddressPlan, ClusterId, Generation, Label, NodeId, Now, Proto, WallMicros};
use weft_core::node::{Command, Input, Node, NodeConfig, Output, Reply, Start, cluster_of};
use weft_core::session::join::is_join_index;
use weft_core::session::transport::Transport;
use weft_core::store::{Stored, Table};
use weft_core::token::Token;
use weft_core::view::{EndpointKind, Method, Publish, ServicePort};
use weft_core::wire::{self, DataHeader, DatagramType, FrameKind, MAX_DATAGRAM, Message};

/// The wall clock when all begins.
pub const NOON: WallMicros = WallMicros(1_800_000_000_000_000);

/// The hosts that have keys.
const HOSTS: usize = 8;

static IDENTITIES: LazyLock<[Identity; HOSTS]> = LazyLock::new(|| {
    std::array::from_fn(|number| Identity::generate(&mut Random::from_seed([number as u8 ^ 3; 32])))
});

/// The keys of a host. Host 1's id is above host 2's: of two that call each other, the one with the lower id insists.
pub fn identity(number: u8) -> Identity {
    IDENTITIES[usize::from(number)].clone()
}

/// A name that is one.
pub fn label(text: &str) -> Label {
    Label::parse(text).expect("only called with labels")
}

/// Where a host is.
pub fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 6783))
}

/// One host: a node, its disk, and what it wants to send.
pub struct Host {
    /// The node.
    pub node: Node,
    /// What is on its disk.
    pub disk: Stored,
    /// Datagrams on their way.
    pub sent: Vec<(SocketAddr, Vec<u8>)>,
    /// Answers to commands.
    pub replies: Vec<(u64, Result<Reply, weft_core::node::CommandError>)>,
    /// It said why it could not begin.
    pub failed: bool,
    /// It may allocate.
    pub ready: bool,
    number: u8,
    now: Now,
}

impl Host {
    /// A host that begins so, with this on its disk.
    pub fn begin(number: u8, start: Start, disk: Stored, now: Now) -> Self {
        let config = NodeConfig {
            name: label(&format!("host-{number}")),
            rename: true,
            cipher: Cipher::ChaCha20Poly1305,
            host_addrs: vec![address(number).ip()],
            underlay: vec![address(number)],
            tcp_port: None,
            relay: true,
            trusted_subnets: Vec::new(),
            esp: weft_core::carriers::Esp::Unasked,
        };
        let node = Node::new(
            identity(number),
            config,
            start,
            disk.clone(),
            [0x40 + number; 32],
        );
        let mut host = Self {
            node,
            disk,
            sent: Vec::new(),
            replies: Vec::new(),
            failed: false,
            ready: false,
            number,
            now,
        };
        let mut out = Vec::new();
        let wall = WallMicros(NOON.0 + now.0.as_micros() as u64);
        host.node.start(now, wall, &mut out);
        host.carry_out(out);
        host
    }

    /// The first host of the scene after a restart.
    pub fn resumed() -> Self {
        Self::begin(1, Start::Resume, SCENE.disk.clone(), Now::default())
    }

    /// Something happens to it.
    pub fn input(&mut self, input: Input<'_>) {
        let mut out = Vec::new();
        self.node.handle(self.now, input, &mut out);
        self.carry_out(out);
    }

    /// A datagram comes.
    pub fn datagram(&mut self, from: SocketAddr, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        self.input(Input::Datagram {
            from: from.into(),
            bytes: &mut bytes,
        });
    }

    /// Time passes, with all that is due in it.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now.plus(time);
        // A deadline that is not moved by being met is due again at once; nothing has thousands of them.
        for _ in 0..4096 {
            let Some(due) = self.node.deadline().filter(|due| *due <= end) else {
                break;
            };
            self.now = self.now.max(due);
            let mut out = Vec::new();
            self.node.expire(self.now, &mut out);
            self.carry_out(out);
        }
        self.now = end;
    }

    /// Shows all that can be seen of it.
    pub fn look(&mut self) {
        let view = self.node.view();
        let peers = self.node.peers(self.now);
        let tunnels = self.node.tunnels();
        if let Some(view) = view {
            assert!(view.members.len() >= tunnels.len());
            assert!(peers.len() <= view.members.len());
            for service in &view.services {
                let _ = view.backends(service);
            }
        }
    }

    fn carry_out(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send { to, datagram } => {
                    assert!(datagram.len() <= MAX_DATAGRAM, "{} octets", datagram.len());
                    // Where connections would go nobody is.
                    self.sent.extend(to.udp().map(|to| (to, datagram)));
                }
                Output::Persist(id, batch) => {
                    self.disk.apply(&batch);
                    self.input(Input::Persisted(id));
                }
                Output::CheckPublish { ask, .. } => {
                    self.input(Input::PublishChecked { ask, owner: None });
                }
                Output::Reply(id, reply) => self.replies.push((id, reply)),
                Output::JoinFailed(_) => self.failed = true,
                Output::Ready => self.ready = true,
                Output::Alarm(text) => assert!(text.len() < 2000, "an alarm is one line"),
                Output::Tunnels | Output::View | Output::Left | Output::VxlanProbe { .. } => {}
            }
        }
    }

    fn transport(&self, index: u32) -> Option<std::sync::Arc<Transport>> {
        self.node
            .tunnels()
            .into_iter()
            .flat_map(|tunnel| tunnel.receivers)
            .find(|transport| transport.local_index() == index)
    }
}

/// What passed between the two.
#[derive(Default)]
pub struct Heard {
    /// Every datagram, and whose it was for.
    pub datagrams: Vec<(u8, Vec<u8>)>,
    /// Every frame, opened, and whose it was for.
    pub frames: Vec<(u8, u8, Vec<u8>)>,
}

/// Host 1 founded, host 2 joined.
pub struct Scene {
    /// The disk of host 1 at the end.
    pub disk: Stored,
    /// The cluster.
    pub cluster: ClusterId,
    /// Its secret.
    pub secret: Secret<32>,
    /// An invitation by host 1, good for many.
    pub token: Token,
    /// What was said.
    pub heard: Heard,
    /// The start of host 2 that host 1 knows.
    pub generation: Generation,
}

/// The scene, played once.
pub static SCENE: LazyLock<Scene> = LazyLock::new(Scene::play);

impl Scene {
    fn play() -> Self {
        let range = AddressPlan::DEFAULT_RANGE;
        let mut one = Host::begin(1, Start::Found { range }, Stored::default(), Now::default());
        one.pass(Duration::from_secs(1));
        let request = TokenRequest {
            ttl_secs: 24 * 3600,
            uses: 0,
            reusable: true,
        };
        one.input(Input::Command(1, Command::MintToken(request)));
        let token = match one.replies.pop() {
            Some((1, Ok(Reply::Token(text)))) => Token::parse(&text).expect("just made"),
            other => panic!("no invitation: {other:?}"),
        };
        commands(&mut one);
        let start = Start::Join {
            token: Box::new(token.clone()),
        };
        let two = Host::begin(2, start, Stored::default(), one.now);
        let mut hosts = [one, two];
        let mut heard = Heard::default();
        talk(&mut hosts, &mut heard, Duration::from_secs(5));
        commands(&mut hosts[1]);
        talk(&mut hosts, &mut heard, Duration::from_secs(3));
        let disk = hosts[0].disk.clone();
        let row = disk
            .get(Table::Cluster, &[b"cluster"])
            .expect("a member's disk has it");
        let mut secret = [0; 32];
        secret.copy_from_slice(&row[17..49]);
        let generation = hosts[0]
            .node
            .view()
            .and_then(|view| Some(view.member(&identity(2).id())?.generation))
            .expect("the second host is a member");
        Self {
            cluster: cluster_of(&disk).expect("a member's disk has it"),
            secret: Secret::new(secret),
            disk,
            token,
            heard,
            generation,
        }
    }

    /// What two members agree on.
    pub fn between(&self) -> Between<'_> {
        Between::Members(self.cluster, &self.secret)
    }

    /// What host 2 seals in its first message to host 1, encoded.
    pub fn init(&self) -> Vec<u8> {
        let mut random = Random::from_seed([7; 32]);
        self.heard
            .datagrams
            .iter()
            .filter(|(to, bytes)| *to == 1 && DatagramType::of(bytes) == Some(DatagramType::Init))
            .find_map(|(_, bytes)| Half::hear(&self.between(), &identity(1), bytes, &mut random))
            .map(|(_, inside)| inside)
            .expect("host 2 called host 1")
    }

    /// The rows of a table, whole.
    pub fn rows(&self, table: Table) -> Vec<Vec<u8>> {
        self.disk
            .rows(table)
            .map(|(_, value)| value.to_vec())
            .collect()
    }
}

/// Something of every kind.
fn commands(host: &mut Host) {
    let number = host.number;
    let attach = Command::Attach {
        kind: EndpointKind::Container,
        names: vec![label("web"), label(&format!("web-{number}"))],
        network: label("default"),
        ip: None,
        labels: [("tier".to_owned(), "front".to_owned())].into(),
    };
    let port = ServicePort {
        proto: Proto::Tcp,
        port: 80,
        target: 8080,
        publish: vec![Publish {
            addr: None,
            port: 8000 + u16::from(number),
        }],
    };
    let service = Command::CreateService(ServiceSpec {
        name: label(&format!("shop-{number}")),
        ports: vec![port],
        selector: [("tier".to_owned(), "front".to_owned())].into(),
        method: Method::Maglev,
    });
    let name = Command::AddName(NameSpec {
        name: label(&format!("printer-{number}")),
        ip: Ipv4Addr::new(198, 51, 100, number).into(),
    });
    let network = Command::CreateNetwork(NetworkSpec {
        name: label(&format!("net-{number}")),
        prefix_len: None,
        subnet: None,
    });
    for (id, command) in [attach, service, name, network].into_iter().enumerate() {
        host.input(Input::Command(10 + id as u64, command));
    }
    let conflict = (Proto::Udp, 53, "dnsmasq (pid 7)".to_owned());
    host.input(Input::Conflicts(vec![conflict]));
}

/// Carries datagrams to and fro; sealed ones are opened on the way, as the carrier does.
fn talk(hosts: &mut [Host; 2], heard: &mut Heard, time: Duration) {
    let end = hosts[0].now.plus(time);
    while hosts[0].now < end {
        for _ in 0..64 {
            let mut queue: VecDeque<(u8, SocketAddr, Vec<u8>)> = VecDeque::new();
            for (from, host) in (1u8..).zip(hosts.iter_mut()) {
                let sent = host.sent.drain(..);
                queue.extend(sent.map(|(_, datagram)| (3 - from, address(from), datagram)));
            }
            if queue.is_empty() {
                break;
            }
            for (to, from, datagram) in queue {
                deliver(&mut hosts[usize::from(to) - 1], from, datagram, heard);
            }
        }
        for host in hosts.iter_mut() {
            host.pass(Duration::from_millis(50));
        }
    }
}

fn deliver(host: &mut Host, from: SocketAddr, datagram: Vec<u8>, heard: &mut Heard) {
    heard.datagrams.push((host.number, datagram.clone()));
    let transport = DataHeader::parse(&datagram)
        .filter(|header| !is_join_index(header.receiver))
        .and_then(|header| host.transport(header.receiver));
    let Some(transport) = transport else {
        return host.datagram(from, &datagram);
    };
    let mut opened = datagram;
    if let Ok((kind, body)) = transport.open(&mut opened) {
        heard.frames.push((host.number, kind, body.to_vec()));
        let local_index = transport.local_index();
        let body = body.to_vec();
        host.input(Input::Opened {
            local_index,
            from: from.into(),
            kind,
            body: &body,
        });
    }
}

/// A session with a host under test, played by host 2.
pub struct Peer {
    transport: Transport,
}

impl Peer {
    /// Host 2 calls.
    pub fn calls(host: &mut Host) -> Option<Self> {
        let mut random = Random::from_seed([5; 32]);
        let (half, datagram) = Half::call(
            &SCENE.between(),
            &identity(2),
            &identity(1).noise_public(),
            77,
            &SCENE.init(),
            &mut random,
        )?;
        let before = host.sent.len();
        host.datagram(address(2), &datagram);
        let (_, answer) = host.sent[before..]
            .iter()
            .find(|(_, bytes)| DatagramType::of(bytes) == Some(DatagramType::Response))?;
        let through = half.finish(identity(1).id(), answer, Cipher::ChaCha20Poly1305)?;
        Some(Self {
            transport: through.transport,
        })
    }

    /// A frame comes to the host, as its carrier opened it.
    pub fn frame(&self, host: &mut Host, kind: u8, body: &[u8]) {
        host.input(Input::Opened {
            local_index: self.transport.remote_index(),
            from: address(2).into(),
            kind,
            body,
        });
    }

    /// A control message comes.
    pub fn message(&self, host: &mut Host, message: &Message) {
        self.frame(host, FrameKind::Control as u8, &wire::encode(message));
    }
}

/// Who host 2 is.
pub fn second() -> NodeId {
    identity(2).id()
}
