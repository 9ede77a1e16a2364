//! Programs for the kernel's own machine (RFC 9669), put together here: what they do is planned like everything else, and no
//! compiler is needed to build or to run weft.

mod assembler;

pub(crate) use self::assembler::{Assembler, Compare, Instruction, Label, Reg, Size};

/// The verdict that leaves a packet to whatever comes after the program: linux/pkt_cls.h, `TC_ACT_UNSPEC`.
pub(crate) const GO_ON: i32 = -1;

/// linux/bpf.h: what a program may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Helper {
    /// `bpf_map_lookup_elem(map, key)`: a pointer to the value, or 0.
    MapLookup = 1,
    /// `bpf_skb_store_bytes(context, offset, from, length, flags)`. What was known of the packet is void then.
    StoreBytes = 9,
    /// `bpf_l4_csum_replace(context, offset, old, new, size)`: as far as the checksum there is not the card's. As
    /// [`Helper::StoreBytes`].
    ReplaceInChecksum = 11,
    /// `bpf_redirect(ifindex, flags)`: out by that device.
    Redirect = 23,
    /// `bpf_redirect_peer(ifindex, flags)`: in at the other end of that veth pair, in another namespace. Since Linux 5.10.
    RedirectPeer = 155,
}

/// linux/bpf.h, `struct __sk_buff`: where a program finds what the kernel knows of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub(crate) enum Context {
    /// Octets, the Ethernet header among them.
    Length = 0,
    /// linux/if_packet.h; 0 is for this host.
    PacketType = 4,
    /// Of the device that it is at.
    Device = 40,
    /// Its first octet.
    Data = 76,
    /// Behind the last one that may be read.
    DataEnd = 80,
    /// Of a super-packet the payload of each of its segments, octets; otherwise 0. Since Linux 5.7.
    SegmentSize = 176,
}
