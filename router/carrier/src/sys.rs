//! The few system calls that no safe wrapper at hand offers: `ioctl` on the TAP, `poll`, an event counter, and socket
//! options with a number in them. The only unsafe code of this crate.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A name that fits `struct ifreq`: at most 15 octets and a zero.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data; all zeroes is a valid value of every member of its union.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl_request(
    fd: BorrowedFd<'_>,
    what: libc::Ioctl,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: the callers pass only requests whose argument is a `struct ifreq`, which lives until the call is over.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), what, std::ptr::from_mut(request)) };
    check(result).map(drop)
}

fn ioctl_number(fd: BorrowedFd<'_>, what: libc::Ioctl, number: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the callers pass only requests whose argument is the number itself, so no memory is touched.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), what, number) };
    check(result).map(drop)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A TAP with one queue, with virtio headers, without packet information.
const TAP_FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes the open `/dev/net/tun` the one queue of the TAP `name`.
pub(crate) fn attach_tap(tun: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = TAP_FLAGS as libc::c_short;
    ioctl_request(tun, libc::TUNSETIFF, &mut request)
}

/// Is this descriptor the queue of such a TAP by the name of `name`, one that is still there?
pub(crate) fn is_tap(fd: BorrowedFd<'_>, name: &str) -> bool {
    let Ok(mut found) = request(name) else {
        return false;
    };
    let wanted = found.ifr_name;
    if ioctl_request(fd, libc::TUNGETIFF, &mut found).is_err() {
        return false;
    }
    // SAFETY: the call just made has filled this member of the union.
    let flags = libc::c_int::from(unsafe { found.ifr_ifru.ifru_flags });
    // Any other flag (a queue of several, one that is detached) is another kind of TAP.
    found.ifr_name == wanted && flags & !libc::IFF_PERSIST == TAP_FLAGS
}

/// The network namespace that a TAP or a socket is in.
pub(crate) fn namespace_of(fd: BorrowedFd<'_>, of: NamespaceOf) -> io::Result<OwnedFd> {
    let what = match of {
        NamespaceOf::Tap => TUNGETDEVNETNS,
        NamespaceOf::Socket => SIOCGSKNS,
    };
    // SAFETY: neither request takes an argument.
    let namespace = check(unsafe { libc::ioctl(fd.as_raw_fd(), what) })?;
    // SAFETY: the call succeeded, so the descriptor is open, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}

/// What a namespace is asked of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NamespaceOf {
    Tap,
    Socket,
}

/// linux/if_tun.h: `_IO('T', 227)`, since Linux 5.2.
const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;
/// linux/sockios.h, since Linux 4.10.
const SIOCGSKNS: libc::Ioctl = 0x894c;

/// Lets the TAP outlive its last descriptor.
pub(crate) fn set_persistent(tun: BorrowedFd<'_>) -> io::Result<()> {
    ioctl_number(tun, libc::TUNSETPERSIST, 1)
}

/// Says which work the reader of the TAP takes over from the kernel.
pub(crate) fn set_offloads(tun: BorrowedFd<'_>, offloads: libc::c_uint) -> io::Result<()> {
    ioctl_number(tun, libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
}

/// Sets the length of the virtio header.
pub(crate) fn set_vnet_length(tun: BorrowedFd<'_>, length: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives until the call is over.
    let result = unsafe {
        libc::ioctl(
            tun.as_raw_fd(),
            libc::TUNSETVNETHDRSZ,
            std::ptr::from_ref(&length),
        )
    };
    check(result).map(drop)
}

/// Gives the device a MAC. `socket` is any one of the device's namespace, here and below.
pub(crate) fn set_mac(socket: BorrowedFd<'_>, name: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut request = request(name)?;
    let mut address = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: [0; 14],
    };
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    ioctl_request(socket, libc::SIOCSIFHWADDR as libc::Ioctl, &mut request)
}

/// Has the device this MAC?
pub(crate) fn has_mac(socket: BorrowedFd<'_>, name: &str, mac: [u8; 6]) -> io::Result<bool> {
    let mut request = request(name)?;
    ioctl_request(socket, libc::SIOCGIFHWADDR as libc::Ioctl, &mut request)?;
    // SAFETY: the call just made has filled this member of the union.
    let found = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
    Ok(found
        .iter()
        .zip(mac)
        .all(|(found, wanted)| *found as u8 == wanted))
}

/// Sets the device's MTU.
pub(crate) fn set_mtu(socket: BorrowedFd<'_>, name: &str, mtu: u32) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu =
        libc::c_int::try_from(mtu).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    ioctl_request(socket, libc::SIOCSIFMTU as libc::Ioctl, &mut request)
}

/// Brings the device up.
pub(crate) fn set_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags(socket, name)? | libc::IFF_UP as libc::c_short;
    ioctl_request(socket, libc::SIOCSIFFLAGS as libc::Ioctl, &mut request)
}

/// Has the kernel begun to send over the device?
pub(crate) fn is_running(socket: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    Ok(flags(socket, name)? & libc::IFF_RUNNING as libc::c_short != 0)
}

fn flags(socket: BorrowedFd<'_>, name: &str) -> io::Result<libc::c_short> {
    let mut request = request(name)?;
    ioctl_request(socket, libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)?;
    // SAFETY: the call just made has filled this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

/// A counter that wakes whoever polls it.
pub(crate) fn event_counter() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the call succeeded, so `fd` is open, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until one of `fds` has something to read (or is broken), or `timeout` milliseconds are over (-1: for ever).
/// Says which.
pub(crate) fn wait_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: i32,
) -> io::Result<[bool; N]> {
    wait_any(fds.map(Some), timeout)
}

/// The same where some may be left out; nothing ever comes for those.
pub(crate) fn wait_any<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    timeout: i32,
) -> io::Result<[bool; N]> {
    wait(fds.map(|fd| (fd, libc::POLLIN)), timeout)
}

/// Waits until `waker` has something to read, or the TAP behind `tap` is gone, however much it has to read. Says which.
pub(crate) fn wait_woken(waker: BorrowedFd<'_>, tap: BorrowedFd<'_>) -> io::Result<[bool; 2]> {
    // A TAP never has what POLLPRI asks for, but who asks for it is woken when the device goes, and told POLLERR then.
    wait(
        [(Some(waker), libc::POLLIN), (Some(tap), libc::POLLPRI)],
        -1,
    )
}

/// The same for room to write.
pub(crate) fn wait_writable(fd: BorrowedFd<'_>, timeout: i32) -> io::Result<bool> {
    wait([(Some(fd), libc::POLLOUT)], timeout).map(|[ready]| ready)
}

fn wait<const N: usize>(
    fds: [(Option<BorrowedFd<'_>>, libc::c_short); N],
    timeout: i32,
) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|(fd, events)| libc::pollfd {
        // poll(2) passes over what is negative.
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events,
        revents: 0,
    });
    // SAFETY: `polled` is an array of N entries and lives until the call is over.
    let result = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, timeout) };
    match check(result) {
        Err(err) if err.kind() == io::ErrorKind::Interrupted => Ok([false; N]),
        Err(err) => Err(err),
        Ok(_) => Ok(polled.map(|p| p.revents != 0)),
    }
}

/// Sets a socket option that is a number.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the kernel reads one int, which lives until the call is over.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

/// Reads a socket option that is a number.
pub(crate) fn option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` octets, those of one int, and both live until the call is over.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_mut(&mut value).cast(),
            &mut length,
        )
    };
    check(result).map(|_| value)
}

/// Octets that were given to the socket and have not left the host yet, with what the kernel needs around them.
pub(crate) fn unsent(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut octets: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int, which lives until the call is over.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::TIOCOUTQ,
            std::ptr::from_mut(&mut octets),
        )
    };
    check(result).map(|_| u64::try_from(octets).unwrap_or(0))
}

/// Octets that were given to a TCP socket and that the kernel has not sent yet; what is sent and not acknowledged is under way.
pub(crate) fn not_sent(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut octets: libc::c_int = 0;
    // SAFETY: SIOCOUTQNSD writes one int, which lives until the call is over.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            SIOCOUTQNSD,
            std::ptr::from_mut(&mut octets),
        )
    };
    check(result).map(|_| u64::try_from(octets).unwrap_or(0))
}

/// linux/sockios.h.
const SIOCOUTQNSD: libc::Ioctl = 0x894b;

/// A socket for whole Ethernet frames with this EtherType on one device, in the calling thread's namespace. It never waits.
pub(crate) fn packet_socket(ether_type: u16, device: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // Protocol 0: it hears nothing before it is bound to the device.
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
    // SAFETY: the call succeeded, so `fd` is open, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `sockaddr_ll` is plain data; all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = ether_type.to_be();
    address.sll_ifindex =
        libc::c_int::try_from(device).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the kernel reads the one `sockaddr_ll`, which lives until the call is over.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    check(result).map(|_| socket)
}

/// Lets go of the address a datagram socket is connected to.
pub(crate) fn disconnect(socket: BorrowedFd<'_>) -> io::Result<()> {
    let nobody = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // SAFETY: the kernel reads the one `sockaddr`, which lives until the call is over.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            std::ptr::from_ref(&nobody),
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}
