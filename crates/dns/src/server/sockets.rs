//! Sockets: how they are opened, and many datagrams at once.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg},
};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;

use super::{MAX_REQUEST, STOP};

/// Why names cannot be answered.
#[derive(Debug, thiserror::Error)]
#[error("cannot answer DNS on {address}: {source}")]
pub struct BindError {
    /// Where.
    address: SocketAddr,
    /// Why not.
    source: io::Error,
}

/// UDP sockets that share the address: the kernel spreads requests over them, which keeps the slowest answers quick.
const SOCKETS: usize = 2;

/// What a socket may hold before it is read, in bytes.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Connections waiting to be accepted.
const BACKLOG: i32 = 1024;

/// Sockets of an address, UDP and TCP.
#[derive(Debug)]
pub struct Sockets {
    pub(super) address: SocketAddr,
    pub(super) udp: Vec<UdpSocket>,
    pub(super) tcp: TcpListener,
}

impl Sockets {
    /// Takes an address, which need not be the machine's yet.
    ///
    /// # Errors
    ///
    /// When it cannot be used: another server does, for one.
    pub fn bind(address: SocketAddr) -> Result<Self, BindError> {
        let failed = |source| BindError { address, source };
        // First, because it shares the address with nobody: another server there is found out.
        let tcp = tcp(address).map_err(failed)?;
        let udp = (0..SOCKETS).map(|_| udp(address).map_err(failed)).collect::<Result<_, _>>()?;
        Ok(Self { address, udp, tcp })
    }
}

fn socket(address: SocketAddr, kind: Type, protocol: socket2::Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv4() {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_freebind_v6(true)?;
    }
    Ok(socket)
}

fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(address, Type::DGRAM, socket2::Protocol::UDP)?;
    socket.set_reuse_port(true)?;
    // A smaller one will do.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    socket.set_read_timeout(Some(STOP))?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address, Type::STREAM, socket2::Protocol::TCP)?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Waits for datagrams and returns how long each of them is and where it is from.
pub(super) fn receive(
    socket: &UdpSocket,
    headers: &mut MultiHeaders<SockaddrStorage>,
    buffers: &mut [[u8; MAX_REQUEST]],
) -> Result<Vec<(usize, Option<SockaddrStorage>)>, Errno> {
    let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
    let received = recvmmsg(socket.as_raw_fd(), headers, slices.iter_mut(), MsgFlags::MSG_WAITFORONE, None)?;
    Ok(received.map(|message| (message.bytes, message.address)).collect())
}

/// Sends answers. As with every datagram, whoever misses one asks again.
pub(super) fn send(
    socket: &UdpSocket,
    headers: &mut MultiHeaders<SockaddrStorage>,
    answers: &[Vec<u8>],
    to: &[Option<SockaddrStorage>],
) {
    let slices: Vec<_> = answers[..to.len()].iter().map(|answer| [IoSlice::new(answer)]).collect();
    let mut next = 0;
    while next < to.len() {
        let sent = sendmmsg(socket.as_raw_fd(), headers, &slices[next..], &to[next..], [], MsgFlags::MSG_DONTWAIT);
        // It fails at the first that cannot be sent.
        next += sent.map_or(1, |sent| sent.count().max(1));
    }
}

pub(super) fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}
