//! Sealed VXLAN in the host's namespace: whether the kernel can do it, and its tables brought to the plan.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use nix::sched::{CloneFlags, unshare};
use weft_core::carriers::EspState;
use weft_core::crypto::Secret;
use weft_core::view::PeerNumber;

use super::host::Host;
use super::netns::alone;
use super::xfrm::Xfrm;
use crate::error::{Doing, Result};
use crate::esp::{EspMemory, EspPlan, Policy, Sa, SaKey};

/// Tries it with a key that nothing uses, in a namespace that nobody else sees and that ends with this. Loads the kernel's
/// modules where it has them.
pub fn esp_available() -> io::Result<()> {
    alone(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let xfrm = Xfrm::open()?;
        let here = IpAddr::from(Ipv4Addr::LOCALHOST);
        let (peer, from, to) = (PeerNumber(0), here, here);
        let key = SaKey {
            peer,
            from,
            to,
            spi: 0x7765,
        };
        let sa = Sa {
            seals: true,
            udp: None,
            key: Secret::new([0; 36]),
            last_packet: 1,
        };
        let policy = Policy {
            peer,
            from,
            to,
            outbound: true,
        };
        xfrm.add_key(&key, &sa)?;
        xfrm.put_policy(&policy)
    })
}

impl Host {
    /// Puts what is wanted and missing: policies, then keys. What stands then is told. Call it before anything leads to
    /// these peers.
    pub fn put_esp(&self, plan: &EspPlan, memory: &mut EspMemory) -> Result<EspState> {
        self.run(|| put(plan, memory))?
            .doing(|| "put keys for ESP".into())
    }

    /// Removes what is there and not wanted. Call it when nothing leads to those peers any more.
    pub fn remove_stray_esp(&self, plan: &EspPlan) -> Result<()> {
        self.run(|| remove_strays(plan))?
            .doing(|| "remove keys for ESP".into())
    }
}

fn put(plan: &EspPlan, memory: &mut EspMemory) -> io::Result<EspState> {
    let xfrm = Xfrm::open()?;
    memory.forget_unwanted(plan);
    let observed = xfrm.observe()?;
    let (policies, keys) = plan.missing(&observed, memory);
    let mut trouble = Vec::new();
    for policy in &policies {
        if let Err(error) = xfrm.put_policy(policy) {
            trouble.push((policy.peer, error.to_string()));
        }
    }
    for (key, sa) in &keys {
        memory.on_put(*key);
        if let Err(error) = xfrm.add_key(key, sa) {
            memory.on_refused(key);
            trouble.push((key.peer, error.to_string()));
        }
    }
    for (key, sa) in &plan.redirected(&observed, memory) {
        if let Err(error) = xfrm.redirect_key(key, sa) {
            trouble.push((key.peer, error.to_string()));
        }
    }
    let mut state = plan.state(&xfrm.observe()?, memory);
    state.trouble = trouble;
    Ok(state)
}

fn remove_strays(plan: &EspPlan) -> io::Result<()> {
    let xfrm = match Xfrm::open() {
        // A kernel without any IPsec has none of weft's.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(()),
        other => other?,
    };
    let (keys, policies) = plan.strays(&xfrm.observe()?);
    for key in &keys {
        xfrm.delete_key(key)?;
    }
    for policy in &policies {
        xfrm.delete_policy(policy)?;
    }
    Ok(())
}
