//! The adapter half: the only place that talks to the kernel.

pub(crate) mod apply;
pub(crate) mod conntrack;
pub(crate) mod domain;
pub(crate) mod doors;
pub(crate) mod esp;
pub(crate) mod fastpath;
pub(crate) mod forwarding;
pub(crate) mod gather;
pub(crate) mod ground;
pub(crate) mod host;
pub(crate) mod leg;
pub(crate) mod netns;
pub(crate) mod nexthop;
pub(crate) mod nfnetlink;
pub mod nft;
pub(crate) mod preflight;
pub(crate) mod ranges;
pub(crate) mod raw;
pub(crate) mod rtnl;
pub(crate) mod rules;
pub(crate) mod shield;
pub(crate) mod sys;
pub(crate) mod sysctl;
pub(crate) mod vxlan;
pub(crate) mod watch;
pub(crate) mod xfrm;
