//! One HTTP/JSON request to the daemon's socket.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use weft_core::control::{ErrorBody, ErrorKind, MAX_BODY};

use crate::error::{CniError, Code};

/// Attaching may wait for another node to give an address away; runtimes wait longer than this.
const PATIENCE: Duration = Duration::from_secs(30);

/// POST.
pub(crate) fn post<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    body: &impl Serialize,
) -> Result<T, CniError> {
    let body = serde_json::to_vec(body)
        .map_err(|e| CniError::new(Code::Daemon, format!("can't encode the request: {e}")))?;
    call(socket, Method::POST, path, Bytes::from(body))
}

/// GET.
pub(crate) fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, CniError> {
    call(socket, Method::GET, path, Bytes::new())
}

fn call<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<T, CniError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CniError::new(Code::Io, format!("can't start: {e}")))?;
    let exchange = async {
        tokio::time::timeout(PATIENCE, exchange(socket, method, path, body))
            .await
            .unwrap_or_else(|_| {
                Err(later(format!(
                    "weft did not answer within {} s",
                    PATIENCE.as_secs()
                )))
            })
    };
    let (status, body) = runtime.block_on(exchange)?;
    if status.is_success() {
        return serde_json::from_slice(&body).map_err(|e| strange(e.to_string()));
    }
    match serde_json::from_slice::<ErrorBody>(&body) {
        Ok(error) => Err(CniError::new(code_of(error.kind), error.error)),
        Err(_) => Err(strange(format!("HTTP status {status}"))),
    }
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), CniError> {
    let stream = UnixStream::connect(socket).await.map_err(|e| {
        later(format!(
            "weft is not running on this host (nobody answers at {}: {e}); start it with: weft up",
            socket.display()
        ))
    })?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "weft")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(|e| strange(e.to_string()))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| lost(&e))?;
    let driver = tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(|e| lost(&e))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY)
        .collect()
        .await
        .map_err(|e| strange(e.to_string()))?
        .to_bytes();
    driver.abort();
    Ok((status, body))
}

fn code_of(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::Config,
        ErrorKind::NotFound => Code::UnknownContainer,
        ErrorKind::Conflict => Code::Conflict,
        ErrorKind::Unavailable => Code::TryAgainLater,
        ErrorKind::Internal => Code::Io,
    }
}

fn later(text: impl Into<String>) -> CniError {
    CniError::new(Code::TryAgainLater, text)
}

fn lost(error: &hyper::Error) -> CniError {
    later(format!("lost the connection to weft: {error}"))
}

fn strange(detail: String) -> CniError {
    CniError::new(
        Code::Daemon,
        format!("weft's answer makes no sense to this version of weft-cni: {detail}"),
    )
}
