//! Ways for this crate to be wrong on purpose. A test lets the simulator run with each of them: a simulator that finds
//! nothing may be blind.
//!
//! There are none unless the crate is built with the feature `mutations`, which nothing that is shipped asks for; and with
//! it there are none either until `select` is called in a thread, which nothing but that test does.

/// One way to be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutation {
    /// What depends on a write happens before the write is durable.
    ActBeforePersisted,
    /// A record that is older than what is held replaces it.
    AcceptStaleSequence,
    /// A freed address is given out at once.
    SkipRest,
    /// A start has the number of the one before.
    ReuseGeneration,
    /// What was given away is not written to disk.
    ForgetGrants,
    /// A start doesn't wait for what peers know of its own log.
    IgnoreOwnLog,
    /// Records of a node that is down are erased.
    EraseDown,
    /// Anybody may give away anybody's space.
    GrantsOfNonOwners,
    /// A void key's records still count.
    AcceptRevoked,
    /// What gossip lost is never fetched.
    NoAntiEntropy,
    /// A use of an invitation counts before it is durable, and is not written.
    ForgetTokenUses,
    /// A removed node's space is taken without its voters' majority.
    SkipMajority,
    /// Who was let in a moment ago votes like everybody.
    NewcomersVote,
    /// Of cluster-wide objects the one that came last wins.
    LastComerWins,
    /// Stamps of next year count at once.
    BelieveTheFuture,
    /// Addresses in use count as free.
    ForgetUsed,
    /// Own records are told before they are on disk.
    TellBeforeSynced,
    /// A removed node keeps its sessions.
    KeepSessions,
    /// A removal is void once its issuer is removed by somebody who had not heard of it.
    ForgetWitnesses,
    /// The branch of a forked chain that came first stays, whatever the removal of who forked it says.
    KeepBranch,
    /// A majority on a removal is one of the voters that there are now.
    CountThePresent,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Mutation; 21] = [
        Mutation::ActBeforePersisted,
        Mutation::AcceptStaleSequence,
        Mutation::SkipRest,
        Mutation::ReuseGeneration,
        Mutation::ForgetGrants,
        Mutation::IgnoreOwnLog,
        Mutation::EraseDown,
        Mutation::GrantsOfNonOwners,
        Mutation::AcceptRevoked,
        Mutation::NoAntiEntropy,
        Mutation::ForgetTokenUses,
        Mutation::SkipMajority,
        Mutation::NewcomersVote,
        Mutation::LastComerWins,
        Mutation::BelieveTheFuture,
        Mutation::ForgetUsed,
        Mutation::TellBeforeSynced,
        Mutation::KeepSessions,
        Mutation::ForgetWitnesses,
        Mutation::KeepBranch,
        Mutation::CountThePresent,
    ];
}

#[cfg(feature = "mutations")]
mod selected {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        static SELECTED: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// From here on this thread is wrong in this way, or right again.
    pub fn select(mutation: Option<Mutation>) {
        SELECTED.set(mutation);
    }

    pub(crate) fn is_on(mutation: Mutation) -> bool {
        SELECTED.get() == Some(mutation)
    }
}

#[cfg(feature = "mutations")]
pub(crate) use selected::is_on;
#[cfg(feature = "mutations")]
pub use selected::select;

#[cfg(not(feature = "mutations"))]
pub(crate) const fn is_on(_: Mutation) -> bool {
    false
}
