//! DNS over TCP (RFC 7766): hickory's own listener knows no limit on connections, so this one is ours.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::counters::count;
use crate::limits::{Limits, Slots};
use crate::reply;
use crate::resolve::Resolver;

/// Longest query read: one name and some EDNS options need far less.
const MAX_QUERY: u16 = 4096;
/// Pause after an accept that failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves one listener until `stop` says true or its sender is gone.
pub(crate) async fn listen(
    listener: TcpListener,
    resolver: Arc<Resolver>,
    slots: Arc<Slots>,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) {
    // Dropping the set at the end ends its connections.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, from)) => match slots.take(from.ip()) {
                Some(slot) => {
                    let resolver = resolver.clone();
                    connections.spawn(async move {
                        // A connection that breaks is its client's affair.
                        let _ = converse(stream, from, &resolver, limits.tcp_idle).await;
                        drop(slot);
                    });
                }
                None => count(&resolver.counters.tcp_refused),
            },
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn converse(
    mut stream: TcpStream,
    from: SocketAddr,
    resolver: &Resolver,
    idle: Duration,
) -> io::Result<()> {
    let from: IpAddr = from.ip().to_canonical();
    stream.set_nodelay(true)?;
    loop {
        let Some(query) = timeout(idle, read(&mut stream)).await?? else {
            return Ok(());
        };
        let Some(request) = reply::read(&query) else {
            count(&resolver.counters.rejected);
            if let Some(error) = reply::form_error(&query) {
                timeout(idle, write(&mut stream, &error)).await??;
            }
            return Ok(());
        };
        let Some(reply) = resolver.answer(&request, from).await else {
            return Ok(());
        };
        let reply = reply::fit(reply, usize::from(u16::MAX)).map_err(io::Error::other)?;
        let bytes = reply.to_vec().map_err(io::Error::other)?;
        timeout(idle, write(&mut stream, &bytes)).await??;
    }
}

/// One message; `None` at the end of the stream or for one that is too long to be a query.
async fn read(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) if length <= MAX_QUERY => length,
        Ok(_) => return Ok(None),
        Err(end) if end.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut query = vec![0; usize::from(length)];
    stream.read_exact(&mut query).await?;
    Ok(Some(query))
}

async fn write(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    // One write, so that length and message leave in one segment.
    stream
        .write_all(&[&length.to_be_bytes(), bytes].concat())
        .await
}
