//! Programs at the ingress of devices (`clsact`).

use std::io;

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use super::{ADD, Rtnl};

/// The one filter at the place.
const PRIORITY: u32 = 1;
const HANDLE: u32 = 1;
/// linux/if_ether.h, as on the wire.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();
const CLSACT: &str = "clsact";

impl Rtnl {
    /// Puts a program at the ingress of a device, in place of the one there.
    pub(crate) fn set_classifier(&self, device: u32, name: &str, program: u32) -> io::Result<()> {
        let mut place = message(device, TcHandle::CLSACT);
        place.header.handle = TcHandle {
            major: TcHandle::CLSACT.major,
            minor: 0,
        };
        place.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
        match self.act(RouteNetlinkMessage::NewQueueDiscipline(place), ADD) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => other?,
        }
        let mut filter = filter(device);
        filter.header.handle = HANDLE.into();
        filter.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(program)),
                TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        let message = RouteNetlinkMessage::NewTrafficFilter(filter);
        self.act(message, netlink_packet_core::NLM_F_CREATE)
    }

    /// Takes away whatever is at the ingress of a device.
    pub(crate) fn remove_classifier(&self, device: u32) -> io::Result<()> {
        let mut place = message(device, TcHandle::CLSACT);
        place.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
        match self.act(RouteNetlinkMessage::DelQueueDiscipline(place), 0) {
            // It is not there, or no longer.
            Err(error) if is_absent(&error) => Ok(()),
            other => other,
        }
    }

    /// The kernel's number of the program at the ingress of a device.
    pub(crate) fn classifier(&self, device: u32) -> io::Result<Option<u32>> {
        let asked = RouteNetlinkMessage::GetTrafficFilter(filter_of(device));
        let answers = match self.talk(asked, NLM_F_DUMP) {
            Err(error) if is_absent(&error) => return Ok(None),
            answers => answers?,
        };
        Ok(answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewTrafficFilter(filter) => program_of(filter),
            _ => None,
        }))
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
    )
}

fn message(device: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = device as i32;
    message.header.parent = parent;
    message
}

fn filter_of(device: u32) -> TcMessage {
    message(
        device,
        TcHandle {
            minor: TcHandle::MIN_INGRESS,
            ..TcHandle::CLSACT
        },
    )
}

fn filter(device: u32) -> TcMessage {
    let mut filter = filter_of(device);
    filter.header.info = PRIORITY << 16 | u32::from(ETH_P_ALL);
    filter
}

fn program_of(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().find_map(|a| match a {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    options.iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
        _ => None,
    })
}
