use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use weft_core::session::transport::Transport;
use weft_core::underlay::Dscp;

use super::*;
use crate::offload::Offloads;
use crate::source_ports::Lane;
use crate::table::States;
use crate::table::tests::{entry, session, table};

const MTU: u16 = 1400;

/// Keeps runs, or declines to cut them.
#[derive(Default)]
struct Kept {
    runs: RefCell<Vec<Vec<Vec<u8>>>>,
    /// The port that each left by.
    sources: RefCell<Vec<u8>>,
    refuses: bool,
}

impl Wire for Kept {
    fn max_run(&self, _: UnderlayAddr) -> usize {
        64
    }

    fn take_congestion(&self, _: Lane) -> bool {
        false
    }

    fn send(&self, lane: Lane, run: Run<'_>) -> io::Result<Sent> {
        self.sources.borrow_mut().push(lane.source);
        let datagrams = run.octets.chunks(run.stride).map(<[u8]>::to_vec);
        self.runs.borrow_mut().push(datagrams.collect());
        Ok(match self.refuses && run.is_many() {
            true => Sent::OneByOne,
            false => Sent::Whole,
        })
    }
}

struct Rig {
    shared: Shared,
    table: Table,
    trials: Trials,
    wire: Kept,
    far: Arc<Transport>,
    now: Instant,
}

fn path() -> UnderlayAddr {
    UnderlayAddr::Udp("192.0.2.2:6783".parse().unwrap())
}

fn rig() -> Rig {
    let (near, far) = session();
    near.seal(FrameKind::Packet, b"inner", &mut Vec::new())
        .unwrap();
    let mut peer = entry(7, 2);
    peer.transport = Some(near.clone());
    peer.path = Some(path().into());
    peer.mtu = Some(MTU);
    Rig {
        shared: Shared::new(Box::new(drop), Dscp::Clear, Offloads::default()),
        table: Table::new(table(vec![peer], vec![near]), &mut States::new()),
        trials: Trials::new(Instant::now()),
        wire: Kept::default(),
        far,
        now: Instant::now(),
    }
}

impl Rig {
    /// As on a host with so many source ports besides the port itself.
    fn with_further_ports(mut self, ports: u8) -> Self {
        self.shared = self.shared.with_further_ports(ports);
        self
    }

    /// Goes on until nothing is left to do. `answered` says which place of which send (counted from 0; those of one round
    /// are a single datagram and a run) gets an answer.
    fn run(&mut self, answered: impl Fn(usize, usize) -> bool) -> OffloadState {
        let mut seen = self.sends();
        self.go_on();
        while let Some(at) = self.trials.deadline() {
            let runs = self.wire.runs.borrow().clone();
            for (send, run) in runs.iter().enumerate().skip(seen) {
                for (place, datagram) in run.iter().enumerate() {
                    let mut body = self.opened(datagram);
                    if answered(send, place) {
                        body[0] = ECHO_REPLY;
                        assert!(self.state().echoes.take(&body));
                    }
                }
            }
            seen = runs.len();
            self.now = self.now.max(at);
            self.go_on();
        }
        self.state().gso.state()
    }

    fn go_on(&mut self) {
        self.trials
            .go_on(self.now, &self.table, &self.shared, &self.wire);
    }

    fn state(&self) -> &crate::table::PeerState {
        &self.table.peers[0].state
    }

    fn opened(&self, datagram: &[u8]) -> Vec<u8> {
        assert_eq!(datagram.len(), usize::from(MTU) + OVERHEAD);
        let mut datagram = datagram.to_vec();
        let (kind, body) = self.far.open(&mut datagram).unwrap();
        assert_eq!((kind, body[0]), (FrameKind::Probe as u8, ECHO_REQUEST));
        body.to_vec()
    }

    fn sends(&self) -> usize {
        self.wire.runs.borrow().len()
    }
}

#[test]
fn where_a_run_arrives_one_round_is_enough() {
    let mut rig = rig();
    assert_eq!(rig.run(|_, _| true), OffloadState::On);
    assert_eq!(rig.sends(), 2);
    // The same again is not tried again.
    rig.go_on();
    assert_eq!(rig.sends(), 2);
}

#[test]
fn where_runs_vanish_or_lose_a_place_they_end() {
    let single = |send: usize, _| send.is_multiple_of(2);
    let all_but_the_second = |send: usize, place| send.is_multiple_of(2) || place != 1;
    assert_eq!(rig().run(single), OffloadState::Failing);
    assert_eq!(rig().run(all_but_the_second), OffloadState::Failing);
}

#[test]
fn losses_and_silence_are_not_held_against_the_runs() {
    assert_eq!(rig().run(|_, _| false), OffloadState::On);
    // Each place is lost once in a while.
    let lossy = |send: usize, place: usize| !(send + place).is_multiple_of(3);
    assert_eq!(rig().run(lossy), OffloadState::On);
    // Hardly anything arrives.
    let poor = |send: usize, _| send == 0 || send == 6;
    assert_eq!(rig().run(poor), OffloadState::On);
}

#[test]
fn a_trial_that_said_nothing_is_begun_anew_while_packets_go_out() {
    let mut rig = rig();
    assert_eq!(rig.run(|_, _| false), OffloadState::On);
    let sends = rig.sends();
    rig.go_on();
    assert_eq!(rig.sends(), sends, "not at once");
    rig.now += AGAIN;
    let vanishes = |send: usize, _| send.is_multiple_of(2);
    assert_eq!(rig.run(vanishes), OffloadState::Failing);
}

#[test]
fn a_refusal_ends_the_trial_and_another_path_begins_it_anew() {
    let mut rig = rig();
    rig.wire.refuses = true;
    assert_eq!(rig.run(|_, _| true), OffloadState::Refused);
    rig.wire.refuses = false;
    rig.go_on();
    assert_eq!(rig.state().gso.state(), OffloadState::Refused);
    rig.table.peers[0].lead_to(UnderlayAddr::Udp("198.51.100.2:6783".parse().unwrap()));
    assert_eq!(rig.run(|_, _| true), OffloadState::On);
}

#[test]
fn answers_to_others_questions_are_left_to_them() {
    let mut rig = rig();
    let mut theirs = [ECHO_REPLY; ECHO];
    assert!(!rig.state().echoes.take(&theirs));
    rig.go_on();
    theirs[1..].copy_from_slice(&5u64.to_le_bytes());
    assert!(!rig.state().echoes.take(&theirs));
    let ours = rig.opened(&rig.wire.runs.borrow()[0][0].clone());
    assert!(!rig.state().echoes.take(&ours), "a question is no answer");
    assert!(!rig.state().echoes.take(&ours[..4]));
}

#[test]
fn who_has_nothing_to_send_tries_nothing() {
    let mut rig = rig();
    let (near, _) = session();
    let mut peer = entry(7, 2);
    peer.transport = Some(near.clone());
    peer.path = Some(path().into());
    rig.table = Table::new(table(vec![peer], vec![near]), &mut States::new());
    rig.go_on();
    assert_eq!((rig.sends(), rig.trials.deadline()), (0, None));
    let later = rig.now + LOOK_EVERY;
    assert!(!rig.trials.is_worth_a_look(rig.now) && rig.trials.is_worth_a_look(later));
}

#[test]
fn what_is_switched_off_is_not_tried() {
    let mut rig = rig();
    rig.shared.offloads = Offloads::new(&[Offload::Gso]);
    rig.go_on();
    assert_eq!((rig.sends(), rig.trials.deadline()), (0, None));
}

#[test]
fn a_source_port_is_used_once_something_from_it_was_answered() {
    // A round: the single one, the run, and from each further port one.
    let mut rig = rig().with_further_ports(3);
    assert_eq!(rig.run(|_, _| true), OffloadState::On);
    assert_eq!(*rig.wire.sources.borrow(), [0, 0, 1, 2, 3]);
    assert_eq!(rig.state().source_ports.get(), 0b111);
}

#[test]
fn a_source_port_that_a_firewall_knows_nothing_of_is_not_used() {
    let mut rig = rig().with_further_ports(3);
    // Only the first round has a run, as that arrives. What comes from the second further port does not.
    rig.run(|send, _| match send {
        0..5 => send != 3,
        _ => (send - 5) % 4 != 2,
    });
    assert_eq!(rig.state().source_ports.get(), 0b101);
    assert_eq!(rig.sends(), 5 + 5 * 4, "six rounds");
    rig.go_on();
    assert_eq!(rig.sends(), 5 + 5 * 4, "it is not asked for ever");
    rig.table.peers[0].lead_to(UnderlayAddr::Udp("198.51.100.2:6783".parse().unwrap()));
    rig.go_on();
    assert_eq!(
        rig.state().source_ports.get(),
        0,
        "another way, another trial"
    );
}

#[test]
fn source_ports_are_tried_where_runs_are_switched_off() {
    let mut rig = rig().with_further_ports(1);
    rig.shared.offloads = Offloads::new(&[Offload::Gso]);
    rig.run(|_, _| true);
    assert_eq!(*rig.wire.sources.borrow(), [0, 1]);
    assert_eq!(rig.state().source_ports.get(), 1);
}
