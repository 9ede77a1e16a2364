//! The fast path's programs: one for the containers' legs, one for each carrier. Each looks at a packet's headers, asks the
//! maps, and either sends it on to another device or leaves it as it came.

use std::net::Ipv4Addr;

use weft_core::layout::GATEWAY_MAC;
use weft_core::model::Proto;

use crate::bpf::Reg::{self, Frame, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9};
use crate::bpf::Size::{self, Byte, Half, Word};
use crate::bpf::{Assembler, Compare, Context, GO_ON, Helper, Instruction, Label};

use super::Backend;
use crate::filter::vxlan::CarrierTraffic;

/// Octets of an Ethernet header.
const ETHERNET: i16 = 14;
/// Of an ICMP header, and the least of any that may be there.
const LEAST: i16 = 8;
const UDP_HEADER: i16 = 8;
const TCP: i32 = 6;
const UDP: i32 = 17;
/// Octets of a TCP header without options.
const TCP_HEADER: i16 = 20;
/// RFC 9293 §3.1: where the header's length in words is, in the upper half of an octet, the flags, and the checksum.
const WORDS: i16 = 12;
const FLAGS: i16 = 13;
const CHECKSUM: i16 = 16;
const SYN: i32 = 0x02;
/// Kind and length of the option that says how long segments may be, and its length (RFC 9293 §3.2).
const MAXIMUM_SEGMENT_SIZE: u16 = 0x0204;
const OPTION: i16 = 4;

/// Where in the stack stands what a map is keyed by, and what is kept.
mod stack {
    /// A device, or a peer's place in the counters.
    pub(super) const INDEX: i16 = -4;
    /// `struct bpf_lpm_trie_key`: bits, and an address.
    pub(super) const PREFIX: i16 = -16;
    /// [`super::Backend`] of source and destination.
    pub(super) const SOURCE: i16 = -24;
    pub(super) const DESTINATION: i16 = -32;
    /// Octets of all headers, which each segment of a super-packet has.
    pub(super) const HEADERS: i16 = -36;
    /// Not 0 if it begins a TCP connection.
    pub(super) const BEGINS: i16 = -40;
    /// The segment size that it is to say.
    pub(super) const SEGMENT: i16 = -42;
}

/// A network, by a number that its addresses share. Those of IPv6 name the block that they are of, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// One number for each network.
    pub(crate) network: u32,
    /// [`weft_core::model::AddressPlan::network_number`].
    pub(crate) block: u16,
}

/// What is known of a leg. All addresses are as they are in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LegValue {
    /// The container's.
    pub(crate) mac: [u8; 6],
    pub(crate) ip: Ipv4Addr,
    pub(crate) place: Place,
}

impl LegValue {
    pub(crate) const LEN: usize = 16;
    const BLOCK: i16 = 6;
    const IP: i16 = 8;
    const NETWORK: i16 = 12;

    pub(crate) fn octets(&self) -> Vec<u8> {
        let mut out = self.mac.to_vec();
        out.extend(self.place.block.to_be_bytes());
        out.extend(self.ip.octets());
        out.extend(self.place.network.to_ne_bytes());
        out
    }
}

/// Where a container's address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HomeValue {
    /// The index of its leg.
    pub(crate) device: u32,
    pub(crate) leg: LegValue,
}

impl HomeValue {
    pub(crate) const LEN: usize = 4 + LegValue::LEN;
    const LEG: i16 = 4;

    pub(crate) fn octets(&self) -> Vec<u8> {
        let mut out = self.device.to_ne_bytes().to_vec();
        out.extend(self.leg.octets());
        out
    }
}

/// Whose a prefix is on one carrier. None reaches beyond one block of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OwnerValue {
    /// The peer's, on the carrier.
    pub(crate) mac: [u8; 6],
    pub(crate) place: Place,
    /// The peer's place in the counters.
    pub(crate) counter: u32,
}

impl OwnerValue {
    pub(crate) const LEN: usize = 16;
    const BLOCK: i16 = 6;
    const NETWORK: i16 = 8;
    const COUNTER: i16 = 12;

    pub(crate) fn octets(&self) -> Vec<u8> {
        let mut out = self.mac.to_vec();
        out.extend(self.place.block.to_be_bytes());
        out.extend(self.place.network.to_ne_bytes());
        out.extend(self.counter.to_ne_bytes());
        out
    }
}

/// How packets get to a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WayValue {
    /// To whom.
    pub(crate) owner: OwnerValue,
    /// The index of the carrier's device, and its MAC.
    pub(crate) device: u32,
    pub(crate) mac: [u8; 6],
    /// What is no longer than this fits the path, octets.
    pub(crate) mtu: u16,
}

impl WayValue {
    pub(crate) const LEN: usize = OwnerValue::LEN + 16;
    const DEVICE: i16 = 16;
    const MAC: i16 = 20;
    const LONGEST: i16 = 28;

    pub(crate) fn octets(&self) -> Vec<u8> {
        let mut out = self.owner.octets();
        out.extend(self.device.to_ne_bytes());
        out.extend(self.mac);
        out.extend([0; 2]);
        // Of a frame, as the packet's length is that of one.
        let longest = u32::from(self.mtu) + ETHERNET as u32;
        out.extend(longest.to_ne_bytes());
        out
    }
}

/// How a peer's [`CarrierTraffic`] stands in its counter: four numbers of 64 bits.
pub(crate) mod counter {
    use super::CarrierTraffic;

    pub(crate) const LEN: usize = 32;
    /// Packets and octets of each way.
    pub(super) const RECEIVED: i16 = 0;
    pub(super) const SENT: i16 = 16;

    pub(crate) fn read(octets: &[u8]) -> CarrierTraffic {
        let number = |n: usize| {
            let octets = octets.get(n * 8..).and_then(|rest| rest.first_chunk());
            octets.map_or(0, |octets| u64::from_ne_bytes(*octets))
        };
        CarrierTraffic {
            rx_packets: number(0),
            rx_octets: number(1),
            tx_packets: number(2),
            tx_octets: number(3),
        }
    }
}

/// An address, a protocol and a port.
pub(crate) const BACKEND_LEN: usize = 8;
/// Bits, and an address.
pub(crate) const PREFIX_LEN: usize = 8;

/// The key of a prefix.
pub(crate) fn prefix(bits: u8, ip: Ipv4Addr) -> Vec<u8> {
    [u32::from(bits).to_ne_bytes(), ip.octets()].concat()
}

/// The key of what a VIP was turned into.
pub(crate) fn backend(Backend { ip, proto, port }: Backend) -> Vec<u8> {
    let proto = match proto {
        Proto::Tcp => TCP,
        Proto::Udp => UDP,
    };
    let [high, low] = port.to_be_bytes();
    [ip.octets(), [0, proto as u8, high, low]].concat()
}

/// What all programs are made for. Numbers are descriptors of maps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// The first octets of all IPv6 addresses of the cluster; `None` where it has none.
    pub(crate) ula: Option<[u8; 6]>,
    /// What VIPs were turned into, if any was: keys only.
    pub(crate) translated: Option<i32>,
    /// By the peer's place its [`counter`]: an array.
    pub(crate) traffic: i32,
}

/// For the ingress of a leg. The maps: by device [`LegValue`], and by the longest prefix [`WayValue`].
pub(crate) fn from_legs(setting: &Setting, legs: i32, ways: i32) -> Vec<Instruction> {
    program(setting, |program, version, pass| {
        program.load(Word, R0, (R6, Context::Device as i16));
        program.store(Word, (Frame, stack::INDEX), R0);
        look_up(program, legs, stack::INDEX, pass);
        program.copy(R8, R0);
        same_mac(program, (R7, 6), R8, pass);
        let (source, own) = ((Frame, stack::SOURCE), (R8, LegValue::IP));
        same(program, Word, source, own, pass);
        version.in_block(program, version.source, (R8, LegValue::BLOCK), pass);
        look_up_prefix(program, ways, stack::DESTINATION, pass);
        too_long(program, R0, pass);
        program.copy(R9, R0);
        let (own, its) = ((R8, LegValue::NETWORK), (R9, OwnerValue::NETWORK));
        same(program, Word, own, its, pass);
        version.in_block(program, version.destination, (R9, OwnerValue::BLOCK), pass);
        not_translated(program, setting, pass);
        version.clamp(program, R9, pass);
        version.hop(program);
        copy_mac(program, (R7, 0), (R9, 0));
        copy_mac(program, (R7, 6), (R9, WayValue::MAC));
        count(program, setting, R9, counter::SENT);
        program.load(Word, R1, (R9, WayValue::DEVICE));
        send(program, Helper::Redirect);
    })
}

/// For the ingress of a carrier. The maps: by address [`HomeValue`], and by the longest prefix [`OwnerValue`].
pub(crate) fn from_peers(setting: &Setting, homes: i32, owners: i32) -> Vec<Instruction> {
    program(setting, |program, version, pass| {
        look_up_prefix(program, owners, stack::SOURCE, pass);
        program.copy(R8, R0);
        same_mac(program, (R7, 6), R8, pass);
        version.in_block(program, version.source, (R8, OwnerValue::BLOCK), pass);
        look_up(program, homes, stack::DESTINATION, pass);
        program.copy(R9, R0);
        let its = (R9, HomeValue::LEG + LegValue::NETWORK);
        same(program, Word, (R8, OwnerValue::NETWORK), its, pass);
        let block = (R9, HomeValue::LEG + LegValue::BLOCK);
        version.in_block(program, version.destination, block, pass);
        not_translated(program, setting, pass);
        version.hop(program);
        copy_mac(program, (R7, 0), (R9, HomeValue::LEG));
        set_mac(program, (R7, 6), GATEWAY_MAC);
        count(program, setting, R8, counter::RECEIVED);
        program.load(Word, R1, (R9, 0));
        send(program, Helper::RedirectPeer);
    })
}

/// Parses, and lets `rest` decide what comes of it, for either family. Registers from then on: R6 the context, R7 the packet,
/// of which all headers may be read, R9 the protocol; keys of source and destination are on the stack.
fn program(
    setting: &Setting,
    rest: impl Fn(&mut Assembler, &IpVersion, Label),
) -> Vec<Instruction> {
    let mut program = Assembler::default();
    let (pass, v6) = (program.label(), program.label());
    program.copy(R6, R1);
    program.load(Word, R0, (R6, Context::PacketType as i16));
    program.jump_if(R0, Compare::Unequal, 0, pass);
    look_at(&mut program, ETHERNET + V4.header + LEAST, pass);
    program.load(Half, R0, (R7, 12));
    program.jump_if(R0, Compare::Unequal, half(V4.ether_type), v6);
    for family in [
        V4,
        IpVersion {
            ula: setting.ula,
            ..V6
        },
    ] {
        if family.version == 6 {
            program.bind(v6);
            if family.ula.is_none() {
                break;
            }
            program.jump_if(R0, Compare::Unequal, half(family.ether_type), pass);
            readable(&mut program, ETHERNET + family.header + LEAST, pass);
        }
        family.parse(&mut program, pass);
        rest(&mut program, &family, pass);
    }
    program.bind(pass);
    program.set(R0, GO_ON);
    program.exit();
    program.finish()
}

/// An IP version in octets.
#[derive(Clone, Copy)]
struct IpVersion {
    version: u8,
    ether_type: u16,
    /// Octets of the header.
    header: i16,
    /// Where in it the protocol, the hops that are left, and both addresses are.
    protocol: i16,
    hops: i16,
    source: i16,
    destination: i16,
    address_len: i16,
    /// Protocol, and types, of echo request and reply.
    icmp: (i32, i32, i32),
    ula: Option<[u8; 6]>,
}

const V4: IpVersion = IpVersion {
    version: 4,
    ether_type: 0x0800,
    header: 20,
    protocol: 9,
    hops: 8,
    source: 12,
    destination: 16,
    address_len: 4,
    icmp: (1, 8, 0),
    ula: None,
};

const V6: IpVersion = IpVersion {
    version: 6,
    ether_type: 0x86dd,
    header: 40,
    protocol: 6,
    hops: 7,
    source: 8,
    destination: 24,
    address_len: 16,
    icmp: (58, 128, 129),
    ula: None,
};

impl IpVersion {
    /// Makes both keys, of what is plain. Leaves the protocol in R9.
    fn parse(&self, program: &mut Assembler, pass: Label) {
        self.plain_header(program, pass);
        program.load(Byte, R0, (R7, ETHERNET + self.hops));
        program.jump_if(R0, Compare::Below, 2, pass);
        for (at, key) in [
            (self.source, stack::SOURCE),
            (self.destination, stack::DESTINATION),
        ] {
            self.own_address(program, at, pass);
            program.load(Word, R0, (R7, ETHERNET + at + self.address_len - 4));
            program.store(Word, (Frame, key), R0);
        }
        program.load(Byte, R9, (R7, ETHERNET + self.protocol));
        self.transport(program, pass);
    }

    /// No options, no fragment. Extension headers of IPv6 are another protocol.
    fn plain_header(&self, program: &mut Assembler, pass: Label) {
        program.load(Byte, R0, (R7, ETHERNET));
        if self.version == 4 {
            program.jump_if(R0, Compare::Unequal, 0x45, pass);
            program.load(Half, R0, (R7, ETHERNET + 6));
            program.jump_if(R0, Compare::Common, half(0x3fff), pass);
        } else {
            program.jump_if(R0, Compare::Below, 0x60, pass);
            program.jump_if(R0, Compare::Above, 0x6f, pass);
        }
    }

    /// One of the cluster's: the prefix, and zeroes behind the network's number.
    fn own_address(&self, program: &mut Assembler, at: i16, pass: Label) {
        let Some(ula) = self.ula else { return };
        let (first, rest) = word_and_half(ula);
        program.load(Word, R0, (R7, ETHERNET + at));
        program.jump_if_word(R0, Compare::Unequal, first, pass);
        program.load(Half, R0, (R7, ETHERNET + at + 4));
        program.jump_if(R0, Compare::Unequal, rest, pass);
        program.load(Word, R0, (R7, ETHERNET + at + 8));
        program.jump_if(R0, Compare::Unequal, 0, pass);
    }

    /// The number in the address there is that of its block.
    fn in_block(&self, program: &mut Assembler, at: i16, block: (Reg, i16), pass: Label) {
        if self.version == 6 {
            same(program, Half, (R7, ETHERNET + at + 6), block, pass);
        }
    }

    /// Ports, of what has some, into the keys.
    fn transport(&self, program: &mut Assembler, pass: Label) {
        let at = ETHERNET + self.header;
        let (icmp, ports, known) = (program.label(), program.label(), program.label());
        let (number, request, reply) = self.icmp;
        program.store_value(Word, (Frame, stack::HEADERS), i32::from(at + UDP_HEADER));
        program.store_value(Word, (Frame, stack::BEGINS), 0);
        program.jump_if(R9, Compare::Equal, number, icmp);
        program.jump_if(R9, Compare::Equal, UDP, ports);
        program.jump_if(R9, Compare::Unequal, TCP, pass);
        readable(program, at + TCP_HEADER, pass);
        program.load(Byte, R0, (R7, at + FLAGS));
        program.mask(R0, SYN);
        program.store(Word, (Frame, stack::BEGINS), R0);
        program.load(Byte, R0, (R7, at + WORDS));
        program.mask(R0, 0xf0);
        program.shift_right(R0, 2);
        program.add(R0, at.into());
        program.store(Word, (Frame, stack::HEADERS), R0);
        program.bind(ports);
        for (port, key) in [(at, stack::SOURCE), (at + 2, stack::DESTINATION)] {
            program.store_value(Byte, (Frame, key + 4), 0);
            program.store(Byte, (Frame, key + 5), R9);
            program.load(Half, R0, (R7, port));
            program.store(Half, (Frame, key + 6), R0);
        }
        program.go_to(known);
        program.bind(icmp);
        program.load(Byte, R0, (R7, at));
        let echo = program.label();
        program.jump_if(R0, Compare::Equal, request, echo);
        program.jump_if(R0, Compare::Unequal, reply, pass);
        program.bind(echo);
        for key in [stack::SOURCE, stack::DESTINATION] {
            program.store_value(Word, (Frame, key + 4), 0);
        }
        program.bind(known);
    }

    /// Who begins a connection says how long the segments may be that it is sent: no longer than the path takes. That is
    /// the first of its options, or it goes the long way. R8 is not what it was then, and all that may be read of the
    /// packet is its headers up to the ports.
    fn clamp(&self, program: &mut Assembler, way: Reg, pass: Label) {
        let (at, done) = (ETHERNET + self.header, program.label());
        let size = at + TCP_HEADER + 2;
        program.load(Word, R0, (Frame, stack::BEGINS));
        program.jump_if(R0, Compare::Equal, 0, done);
        look_at(program, at + TCP_HEADER + OPTION, pass);
        program.load(Byte, R0, (R7, at + WORDS));
        program.jump_if(
            R0,
            Compare::Below,
            i32::from(TCP_HEADER + OPTION) << 2,
            pass,
        );
        program.load(Half, R0, (R7, at + TCP_HEADER));
        program.jump_if(R0, Compare::Unequal, half(MAXIMUM_SEGMENT_SIZE), pass);
        program.load(Half, R3, (R7, size));
        program.copy(R0, R3);
        program.swap_half(R0);
        program.load(Word, R4, (way, WayValue::LONGEST));
        program.add(R4, -i32::from(at + TCP_HEADER));
        program.jump_if_both(R4, Compare::Above, R0, done);
        program.swap_half(R4);
        program.store(Half, (Frame, stack::SEGMENT), R4);
        program.copy(R1, R6);
        program.set(R2, i32::from(at + CHECKSUM));
        program.set(R5, 2);
        program.call(Helper::ReplaceInChecksum);
        program.jump_if(R0, Compare::Unequal, 0, pass);
        program.copy(R1, R6);
        program.set(R2, i32::from(size));
        program.copy(R3, Frame);
        program.add(R3, stack::SEGMENT.into());
        program.set(R4, 2);
        program.set(R5, 0);
        program.call(Helper::StoreBytes);
        look_at(program, at + LEAST, pass);
        program.bind(done);
    }

    /// One hop less is left.
    fn hop(&self, program: &mut Assembler) {
        if self.version == 4 {
            // RFC 1624: one less in the upper half of a word is one more in the checksum, with what it carries.
            let whole = program.label();
            program.load(Half, R0, (R7, ETHERNET + 10));
            program.add(R0, half(0x0100));
            program.jump_if(R0, Compare::Below, 0xffff, whole);
            program.add(R0, 1);
            program.bind(whole);
            program.store(Half, (R7, ETHERNET + 10), R0);
        }
        program.load(Byte, R0, (R7, ETHERNET + self.hops));
        program.add(R0, -1);
        program.store(Byte, (R7, ETHERNET + self.hops), R0);
    }
}

/// Two octets of a packet as a load of them gives them.
fn half(value: u16) -> i32 {
    i32::from(value.to_be())
}

/// The packet in R7, of which so many octets are there, and its end in R8.
fn look_at(program: &mut Assembler, octets: i16, pass: Label) {
    program.load(Word, R7, (R6, Context::Data as i16));
    program.load(Word, R8, (R6, Context::DataEnd as i16));
    readable(program, octets, pass);
}

/// So many octets are there.
fn readable(program: &mut Assembler, octets: i16, pass: Label) {
    program.copy(R1, R7);
    program.add(R1, octets.into());
    program.jump_if_both(R1, Compare::Above, R8, pass);
}

/// The value of a key on the stack, in R0.
fn look_up(program: &mut Assembler, map: i32, key: i16, absent: Label) {
    program.map(R1, map);
    program.copy(R2, Frame);
    program.add(R2, key.into());
    program.call(Helper::MapLookup);
    program.jump_if(R0, Compare::Equal, 0, absent);
}

/// The value of the longest prefix that has an address on the stack, in R0.
fn look_up_prefix(program: &mut Assembler, map: i32, key: i16, absent: Label) {
    program.store_value(Word, (Frame, stack::PREFIX), 32);
    program.load(Word, R0, (Frame, key));
    program.store(Word, (Frame, stack::PREFIX + 4), R0);
    look_up(program, map, stack::PREFIX, absent);
}

/// What is longer than the path takes, of a super-packet each of its segments, is answered by the domain.
fn too_long(program: &mut Assembler, way: Reg, pass: Label) {
    let one = program.label();
    program.load(Word, R1, (R6, Context::Length as i16));
    program.load(Word, R2, (R6, Context::SegmentSize as i16));
    program.jump_if(R2, Compare::Equal, 0, one);
    program.load(Word, R1, (Frame, stack::HEADERS));
    program.add_both(R1, R2);
    program.bind(one);
    program.load(Word, R2, (way, WayValue::LONGEST));
    program.jump_if_both(R1, Compare::Above, R2, pass);
}

/// Neither end is what a VIP was turned into: connection tracking must turn it back.
fn not_translated(program: &mut Assembler, setting: &Setting, pass: Label) {
    let Some(map) = setting.translated else {
        return;
    };
    for key in [stack::SOURCE, stack::DESTINATION] {
        let absent = program.label();
        look_up(program, map, key, absent);
        program.go_to(pass);
        program.bind(absent);
    }
}

fn same(program: &mut Assembler, size: Size, one: (Reg, i16), other: (Reg, i16), pass: Label) {
    program.load(size, R1, one);
    program.load(size, R2, other);
    program.jump_if_both(R1, Compare::Unequal, R2, pass);
}

/// A MAC of the packet is the one that a value begins with.
fn same_mac(program: &mut Assembler, (packet, at): (Reg, i16), value: Reg, pass: Label) {
    for (size, offset) in [(Word, 0), (Half, 4)] {
        same(program, size, (packet, at + offset), (value, offset), pass);
    }
}

fn copy_mac(program: &mut Assembler, (to, at): (Reg, i16), (from, there): (Reg, i16)) {
    for (size, offset) in [(Word, 0), (Half, 4)] {
        program.load(size, R1, (from, there + offset));
        program.store(size, (to, at + offset), R1);
    }
}

fn set_mac(program: &mut Assembler, (to, at): (Reg, i16), mac: [u8; 6]) {
    let (first, rest) = word_and_half(mac);
    program.store_value(Word, (to, at), first);
    program.store_value(Half, (to, at + 4), rest);
}

/// Six octets as a load or store of four and one of two has them.
fn word_and_half([a, b, c, d, e, f]: [u8; 6]) -> (i32, i32) {
    let rest = u16::from_ne_bytes([e, f]);
    (i32::from_ne_bytes([a, b, c, d]), rest.into())
}

/// One packet more, of the peer of an [`OwnerValue`], or of a [`WayValue`], which begins with one.
fn count(program: &mut Assembler, setting: &Setting, owner: Reg, way: i16) {
    let unknown = program.label();
    program.load(Word, R1, (owner, OwnerValue::COUNTER));
    program.store(Word, (Frame, stack::INDEX), R1);
    look_up(program, setting.traffic, stack::INDEX, unknown);
    program.set(R1, 1);
    program.add_shared((R0, way), R1);
    program.load(Word, R1, (R6, Context::Length as i16));
    program.add(R1, -i32::from(ETHERNET));
    program.add_shared((R0, way + 8), R1);
    program.bind(unknown);
}

/// Ends the program by sending the packet to the device in R1.
fn send(program: &mut Assembler, how: Helper) {
    program.set(R2, 0);
    program.call(how);
    program.exit();
}
