//! The `vxlan` carrier of this host: its devices are up while their filter stands and no longer, and the core knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};
use weft_carrier::{CarrierEvent, VxlanProbes};
use weft_core::carriers::{Devices, EspState};
use weft_core::layout::{VXLAN_CARRIER, VXLAN_CARRIER6, VXLAN_CARRIERS};
use weft_core::view::{View, VxlanView};
use weft_kernel::{Domain, EspMemory, EspPlan, EspPort, Host, KernelError, nft, plan_esp};

use super::core_thread::{Core, Message};
use super::{Daemon, service_manager};

/// How often traffic over the carrier is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Without their filter the devices are down: also told by who hears first that somebody changed the host's rules, because a
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

impl Drop for VxlanDevices {
    /// This one no longer holds it up: who was given its socket, a successor or the service manager, does from now on.
    fn drop(&mut self) {
        self.host.lower_shield();
    }
}

/// That of IPv6 while some peer is reached so. The other one stands ready.
fn is_wanted(device: &str, vxlan: Option<&VxlanView>) -> bool {
    let Some(vxlan) = vxlan else { return false };
    let mut addresses = vxlan.peers.iter().map(|peer| peer.addr);
    device == VXLAN_CARRIER || addresses.any(|host: IpAddr| host.is_ipv6())
}

/// What is counted.
#[derive(PartialEq, Eq)]
struct Counts {
    /// On these devices, by their indices,
    devices: BTreeMap<&'static str, u32>,
    /// for these.
    macs: Vec<[u8; 6]>,
}

/// What the kernel's thread keeps of it.
pub(super) struct VxlanDevices {
    domain: Arc<Domain>,
    host: Arc<Host>,
    core: Core,
    /// The devices that are up: the index, and what sends probes over it.
    up: BTreeMap<&'static str, (u32, Arc<VxlanProbes>)>,
    /// Devices that are not there: an earlier daemon's was looked for.
    absent: BTreeSet<&'static str>,
    /// What is counted: on which devices, and for whom.
    counts: Option<Counts>,
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

impl VxlanDevices {
    pub(super) fn new(domain: Arc<Domain>, host: Arc<Host>, core: Core) -> Self {
        Self {
            domain,
            host,
            core,
            up: BTreeMap::new(),
            absent: BTreeSet::new(),
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

    /// Once nothing leads there any more: devices and keys that are not wanted.
    pub(super) fn remove_strays(&mut self, view: &View) {
        self.remove_stray_devices(view);
        self.remove_stray_keys(view);
    }

    fn remove_stray_devices(&mut self, view: &View) {
        for device in VXLAN_CARRIERS {
            if !is_wanted(device, view.vxlan.as_ref()) {
                self.remove(device);
            }
        }
    }

    fn remove_stray_keys(&mut self, view: &View) {
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

    fn remove(&mut self, device: &'static str) {
        self.up.remove(device);
        if self.absent.contains(device) {
            return;
        }
        match self.domain.remove_vxlan(device) {
            Ok(()) => drop(self.absent.insert(device)),
            Err(error) => warn!(%error, "a device of the vxlan carrier can't be removed"),
        }
    }

    /// The first thing of a pass: without its filter the device is down, before anything is done that takes time.
    pub(super) fn guard(&mut self, view: &View) {
        if view.vxlan.is_some() {
            close_unguarded(&self.domain, &self.host);
        }
    }

    /// Once the rules of both namespaces are in place, or were refused: the devices up or down. Those that are up.
    pub(super) fn keep(
        &mut self,
        view: &View,
        rules: Result<(), String>,
    ) -> BTreeSet<&'static str> {
        let Some(vxlan) = &view.vxlan else {
            // An earlier daemon's: nothing guards them any more.
            self.remove_stray_devices(view);
            self.lower_shield();
            return BTreeSet::new();
        };
        let guarded = rules.and_then(|()| match self.is_guarded() {
            true => Ok(()),
            false => Err("its filter does not stand".to_owned()),
        });
        if guarded.is_ok() {
            self.raise_shield(vxlan);
        }
        let devices = Devices {
            v4: self.keep_device(VXLAN_CARRIER, vxlan, &guarded),
            v6: self.keep_device(VXLAN_CARRIER6, vxlan, &guarded),
        };
        self.count(vxlan);
        let trouble = |device, state: &Result<_, String>| {
            let trouble = state.as_ref().err().cloned();
            trouble.filter(|_| is_wanted(device, Some(vxlan)))
        };
        let v6 = trouble(VXLAN_CARRIER6, &devices.v6);
        self.remember(trouble(VXLAN_CARRIER, &devices.v4).or(v6));
        // Every time: a message may be lost while the core is very busy.
        self.core.tell(Message::Vxlan(devices));
        self.up.keys().copied().collect()
    }

    fn keep_device(
        &mut self,
        device: &'static str,
        vxlan: &VxlanView,
        guarded: &Result<(), String>,
    ) -> Result<Arc<VxlanProbes>, String> {
        if !is_wanted(device, Some(vxlan)) {
            return Err("nobody asked for it yet".to_owned());
        }
        self.absent.remove(device);
        let state = guarded.clone().and_then(|()| {
            let index = self.domain.ensure_vxlan(&self.host, device, vxlan.mac);
            self.probes_on(device, index.map_err(|error| error.to_string())?)
        });
        if state.is_err() {
            self.close(device);
        }
        state
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
    fn count(&mut self, vxlan: &VxlanView) {
        let devices = self.up.iter().map(|(device, (index, _))| (*device, *index));
        let wanted = Counts {
            devices: devices.collect(),
            macs: vxlan.peers.iter().map(|peer| peer.mac).collect(),
        };
        if wanted.devices.is_empty() || self.counts.as_ref() == Some(&wanted) {
            return;
        }
        let devices = wanted.devices.keys().copied().collect();
        let counting = nft::count_vxlan(&self.domain, &devices, &wanted.macs);
        self.is_counted = counting.is_ok();
        if let Err(error) = counting {
            info!(%error, "traffic over the vxlan carrier is not counted");
        }
        // Not again before something changes: a kernel that can't will not.
        self.counts = Some(wanted);
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

    fn close(&mut self, device: &str) {
        self.up.remove(device);
        if let Err(error) = self.domain.close_vxlan(device) {
            warn!(%error, "the vxlan carrier can't be closed");
        }
    }

    fn probes_on(&mut self, device: &'static str, index: u32) -> Result<Arc<VxlanProbes>, String> {
        if let Some((of, probes)) = self.up.get(device)
            && *of == index
        {
            return Ok(probes.clone());
        }
        let core = self.core.clone();
        let heard = move |from, nonce| core.tell(Message::VxlanProbe(from, nonce));
        let domain = self.domain.fd().map_err(|error| error.to_string())?;
        let probes = VxlanProbes::start(&domain, index, heard);
        let probes = Arc::new(probes.map_err(|error| format!("can't send probes: {error}"))?);
        self.up.insert(device, (index, probes.clone()));
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
