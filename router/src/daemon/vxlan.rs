//! The `vxlan` carrier of this host: its device is up while its filter stands and no longer, and the core knows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};
use weft_carrier::{CarrierEvent, VxlanProbes};
use weft_core::carriers::EspState;
use weft_core::view::{View, VxlanView};
use weft_kernel::{Domain, EspMemory, EspPlan, EspPort, Host, KernelError, nft, plan_esp};

use super::core_thread::{Core, Message};
use super::{Daemon, service_manager};

/// How often traffic over the carrier is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Without its filter the device is down: also told by who hears first that somebody changed the host's rules, because a
/// pass of the kernel's thread may be under way.
pub(super) fn close_unguarded(domain: &Domain, host: &Host) {
    if let Err(error) = domain.close_unguarded_vxlan(host) {
        warn!(%error, "the vxlan carrier can't be closed");
    }
}

/// The kernel carries packets over VXLAN without a word. What comes from a peer keeps its session in use, and watched as
/// closely as if the packets went through it: a peer that falls silent is noticed as fast.
pub(super) async fn follow_traffic(daemon: Arc<Daemon>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    let mut known = BTreeMap::new();
    loop {
        ticks.tick().await;
        let Some(vxlan) = daemon.core.view().and_then(|view| view.vxlan.clone()) else {
            continue;
        };
        let domain = daemon.domain.clone();
        let read = tokio::task::spawn_blocking(move || nft::vxlan_received(&domain));
        let Ok(Ok(received)) = read.await else {
            continue;
        };
        for peer in vxlan.peers {
            let now = received.get(&peer.mac).copied().unwrap_or(0);
            // The table may have been replaced, and begun to count anew.
            if now > 0 && known.get(&peer.mac) != Some(&now) {
                let wanted = CarrierEvent::Wanted(peer.number);
                daemon.core.tell(Message::Carrier(wanted));
            }
        }
        known = received;
    }
}

impl Drop for VxlanDevice {
    /// This one no longer holds it up: who was given its socket, a successor or the service manager, does from now on.
    fn drop(&mut self) {
        self.host.lower_shield();
    }
}

/// What the kernel's thread keeps of it.
pub(super) struct VxlanDevice {
    domain: Arc<Domain>,
    host: Arc<Host>,
    core: Core,
    /// The device's index, and what sends probes over it.
    probes: Option<(u32, Arc<VxlanProbes>)>,
    /// An earlier daemon's device was looked for, on a host without trusted subnets.
    is_swept: bool,
    /// What is counted: on which device, and for whom.
    counts: Option<(u32, Vec<[u8; 6]>)>,
    is_counted: bool,
    /// The kernel has no tables that belong to one process, and that was logged.
    is_bare: bool,
    trouble: Option<String>,
    /// Keys for ESP that this process put into the kernel.
    keys: EspMemory,
    /// By which ESP comes through NATs, while some peer's does.
    esp_port: Option<EspPort>,
    /// What was wanted of ESP last; `None` until an earlier daemon's keys were looked for.
    sealed: Option<EspPlan>,
}

impl VxlanDevice {
    pub(super) fn new(domain: Arc<Domain>, host: Arc<Host>, core: Core) -> Self {
        Self {
            domain,
            host,
            core,
            probes: None,
            is_swept: false,
            counts: None,
            is_counted: false,
            is_bare: false,
            trouble: None,
            keys: EspMemory::default(),
            esp_port: None,
            sealed: None,
        }
    }

    /// Before anything leads to sealed peers: their policies and keys.
    pub(super) fn put_keys(&mut self, view: &View) {
        let plan = plan_esp(view);
        let opened = self.keep_esp_port(&plan);
        if plan.is_empty() {
            return;
        }
        let state = self.host.put_esp(&plan, &mut self.keys);
        let mut state = state.unwrap_or_else(|error| {
            let said = error.to_string();
            let peers = view.vxlan.iter().flat_map(|vxlan| &vxlan.esp);
            EspState {
                trouble: peers.map(|peer| (peer.number, said.clone())).collect(),
                ..EspState::default()
            }
        });
        if let Err(error) = opened {
            let behind_nat = plan.peers_in_udp();
            let trouble = behind_nat.map(|peer| (peer, error.to_string()));
            state.trouble.extend(trouble);
        }
        // Every time: a message may be lost while the core is very busy.
        self.core.tell(Message::Esp(state));
    }

    /// The port is open while somebody's ESP comes by it.
    fn keep_esp_port(&mut self, plan: &EspPlan) -> Result<(), KernelError> {
        let is_wanted = plan.peers_in_udp().next().is_some();
        match (is_wanted, &self.esp_port) {
            (false, _) => self.esp_port = None,
            (true, None) => self.esp_port = Some(self.host.open_esp_port()?),
            (true, Some(_)) => {}
        }
        Ok(())
    }

    /// Once nothing leads to them any more: what is not wanted.
    pub(super) fn remove_stray_keys(&mut self, view: &View) {
        let plan = plan_esp(view);
        let was_empty = self.sealed.as_ref().is_some_and(EspPlan::is_empty);
        if was_empty && plan.is_empty() {
            return;
        }
        match self.host.remove_stray_esp(&plan) {
            Ok(()) => self.sealed = Some(plan),
            Err(error) => warn!(%error, "keys for ESP that nobody uses are still in the kernel"),
        }
    }

    /// The first thing of a pass: without its filter the device is down, before anything is done that takes time.
    pub(super) fn guard(&mut self, view: &View) {
        if view.vxlan.is_some() {
            close_unguarded(&self.domain, &self.host);
        }
    }

    /// Once the rules of both namespaces are in place, or were refused: the device up or down. True if it is up.
    pub(super) fn keep(&mut self, view: &View, rules: Result<(), String>) -> bool {
        let Some(vxlan) = &view.vxlan else {
            self.sweep();
            return false;
        };
        let state = rules
            .and_then(|()| match self.is_guarded() {
                true => {
                    self.raise_shield(vxlan);
                    Ok(())
                }
                false => Err("its filter does not stand".to_owned()),
            })
            .and_then(|()| {
                let index = self.domain.ensure_vxlan(&self.host, vxlan.mac);
                index.map_err(|error| error.to_string())
            })
            .and_then(|index| {
                self.count(index, vxlan);
                self.probes_on(index)
            });
        if state.is_err() {
            self.close();
        }
        self.remember(state.as_ref().err().cloned());
        let is_up = state.is_ok();
        // Every time: a message may be lost while the core is very busy.
        self.core.tell(Message::Vxlan(state));
        is_up
    }

    /// Why the device is not up, for `weft status`.
    pub(super) fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.as_ref()?;
        Some(format!(
            "plain VXLAN is not used, all is encrypted: {trouble}"
        ))
    }

    /// Does the host's filter for it stand?
    fn is_guarded(&self) -> bool {
        nft::guards_vxlan(&self.host).unwrap_or(false)
    }

    /// Is all that passes counted? What takes the fast path only is where the device's own hooks count.
    pub(super) fn is_counted(&self) -> bool {
        self.is_counted
    }

    /// For `weft peers`. Without it all is well, but nobody sees how much.
    fn count(&mut self, index: u32, vxlan: &VxlanView) {
        let macs: Vec<[u8; 6]> = vxlan.peers.iter().map(|peer| peer.mac).collect();
        let wanted = Some((index, macs));
        if self.counts == wanted {
            return;
        }
        let macs = wanted.iter().flat_map(|(_, macs)| macs);
        let macs: Vec<[u8; 6]> = macs.copied().collect();
        let counting = nft::count_vxlan(&self.domain, &macs);
        self.is_counted = counting.is_ok();
        if let Err(error) = counting {
            info!(%error, "traffic over the vxlan carrier is not counted");
        }
        // Not again before something changes: a kernel that can't will not.
        self.counts = wanted;
    }

    /// Without it a flush of the host's rules lets forged packets in until the device is down: some milliseconds.
    fn raise_shield(&mut self, vxlan: &VxlanView) {
        match self.host.raise_shield(vxlan) {
            Ok(true) => match self.host.shield_socket() {
                Ok(socket) => service_manager::keep_shield(socket.as_ref()),
                Err(error) => {
                    warn!(%error, "the vxlan carrier's guard would end with this process")
                }
            },
            Ok(false) => {}
            Err(error) if !std::mem::replace(&mut self.is_bare, true) => {
                info!(%error, "no table of its own guards the vxlan carrier");
            }
            Err(_) => {}
        }
    }

    fn lower_shield(&self) {
        if self.host.has_shield() {
            self.host.lower_shield();
            service_manager::keep_shield(None);
        }
    }

    fn close(&mut self) {
        if let Err(error) = self.domain.close_vxlan() {
            warn!(%error, "the vxlan carrier can't be closed");
        }
    }

    fn sweep(&mut self) {
        self.lower_shield();
        if !self.is_swept {
            match self.domain.remove_vxlan() {
                Ok(()) => self.is_swept = true,
                Err(error) => warn!(%error, "the vxlan carrier can't be removed"),
            }
        }
    }

    fn probes_on(&mut self, index: u32) -> Result<Arc<VxlanProbes>, String> {
        if let Some((of, probes)) = &self.probes
            && *of == index
        {
            return Ok(probes.clone());
        }
        let core = self.core.clone();
        let heard = move |from, nonce| core.tell(Message::VxlanProbe(from, nonce));
        let domain = self.domain.fd().map_err(|error| error.to_string())?;
        let probes = VxlanProbes::start(&domain, index, heard);
        let probes = Arc::new(probes.map_err(|error| format!("can't send probes: {error}"))?);
        self.probes = Some((index, probes.clone()));
        Ok(probes)
    }

    /// Logged when it begins, changes or ends.
    fn remember(&mut self, trouble: Option<String>) {
        if self.trouble != trouble {
            match &trouble {
                Some(error) => warn!(%error, "plain VXLAN is not used"),
                None => info!("the vxlan carrier is up"),
            }
            self.trouble = trouble;
        }
    }
}
