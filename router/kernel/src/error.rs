//! What can go wrong at the kernel's door.

use std::io;

use weft_core::model::EndpointId;

/// Why something could not be done. Unless a variant says otherwise nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel refused one step. Steps before it are done; the next reconciliation takes up from there.
    #[error("can't {doing}: {source}")]
    System {
        /// What was tried, in words that follow "can't".
        doing: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The name is no domain's: weft's domains are called `weft-` and letters or digits.
    #[error("\"{0}\" is not the name of a domain")]
    DomainName(String),
    /// The namespace behind the domain's name is the host's own.
    #[error("{0} is the host's own network namespace, not a domain; remove that file")]
    DomainIsHost(String),
    /// `weft0` belongs to somebody else.
    #[error(
        "an interface named {0} exists already and does not lead to this node's domain; is another weft running on this host? (`weft down` there, or `ip link del {0}`, frees the name)"
    )]
    HostLegTaken(&'static str),
    /// Another device or program has what the `vxlan` carrier needs.
    #[error(
        "VXLAN network 6783 or UDP port 6784 is taken on this host, by another program or by what another weft left \
         behind (`ip -all netns exec ip -d link show type vxlan` finds it)"
    )]
    VxlanTaken,
    /// The namespace to attach can't be used.
    #[error("{target} can't be attached: {why}")]
    Target {
        /// The path or process.
        target: String,
        /// Why not.
        #[source]
        why: Refusal,
    },
    /// The interface is there already.
    #[error("that namespace already has an interface named {0}; choose another with --ifname")]
    InterfaceExists(String),
    /// Not an interface name.
    #[error("\"{0}\" is not an interface name (1 to 15 letters, digits, '.', '_' or '-')")]
    InterfaceName(String),
    /// The endpoint has a leg already.
    #[error("endpoint {0} is attached already")]
    Attached(EndpointId),
    /// What an attachment should have and has not.
    #[error("endpoint {id} is no longer as it was attached: {missing}")]
    Broken {
        /// The endpoint.
        id: EndpointId,
        /// What is missing.
        missing: &'static str,
    },
    /// Devices were still there when the time to wait for their end was over.
    #[error("still there after {0} s: {1}")]
    StillThere(u64, String),
    /// The nft binary or the kernel refused a table.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The caller could not keep the state that must outlive a crash; the step that needed it was not done.
    #[error("can't keep the host's former settings: {0}")]
    Save(#[source] io::Error),
}

/// Why a namespace is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Relative, or with `..` in it.
    #[error("want an absolute path without \"..\"")]
    Path,
    /// A symbolic link outside `/proc` could be turned to another namespace later.
    #[error("it is a symbolic link")]
    Link,
    /// There is nothing, or no right to it.
    #[error("{0}")]
    Open(String),
    /// Not a file of the kernel's namespace filesystem.
    #[error("it is not a network namespace")]
    NotNetns,
    /// The host's own.
    #[error("it is the host's own network namespace")]
    Host,
    /// A domain of weft.
    #[error("it is a domain of weft itself")]
    Domain,
    /// No such process (any more).
    #[error("there is no such process")]
    NoProcess,
}

/// What nft said.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// None of the usual places has it.
    #[error("the nft binary is missing; install the package nftables")]
    Missing,
    /// It can't be run.
    #[error("can't run {path}: {source}")]
    Run {
        /// The binary.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It refused the text; the kernel's tables are as before.
    #[error("nft refused the rules: {0}")]
    Refused(String),
}

pub(crate) type Result<T, E = KernelError> = std::result::Result<T, E>;

/// Names what was being done when the kernel said no.
pub(crate) trait Doing<T> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| KernelError::System {
            doing: doing(),
            source: e.into(),
        })
    }
}
