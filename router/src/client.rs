//! Speaks HTTP/JSON with the daemon over its socket: one request, one connection.

use std::io::ErrorKind as Io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use weft_core::control::{ErrorBody, MAX_BODY, SOCKET};

/// How long the daemon may take for what only reads or writes a record.
const USUAL: Duration = Duration::from_secs(15);

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// There is no socket, or nobody listens on it.
    #[error("weft is not running on this host (nobody answers at {0}); start it with: weft up")]
    NotRunning(PathBuf),
    /// The socket is root's.
    #[error("only root may speak to weft ({0}); run this as root, for example with sudo")]
    Denied(PathBuf),
    /// The daemon accepted and then took too long.
    #[error("weft did not answer within {0} s; see its log, weft.log in the run directory")]
    Timeout(u64),
    /// The daemon said no.
    #[error("{}", .0.error)]
    Remote(ErrorBody),
    /// What came back is not what this version understands.
    #[error("weft's answer to {request} makes no sense to this version of the command: {detail}")]
    Answer {
        /// Method and path.
        request: String,
        /// What was wrong.
        detail: String,
    },
    /// The connection broke.
    #[error("lost the connection to weft at {socket}: {source}")]
    Lost {
        /// Where.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl ClientError {
    /// Is it that no daemon is there at all?
    pub(crate) fn is_not_running(&self) -> bool {
        matches!(self, Self::NotRunning(_))
    }
}

/// The daemon of one run directory.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    patience: Duration,
}

impl Client {
    /// The daemon whose socket lies in `run_dir`. Nothing is opened yet.
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self {
            socket: run_dir.join(SOCKET),
            patience: USUAL,
        }
    }

    /// The same for requests that may take as long as this.
    pub(crate) fn patient(&self, patience: Duration) -> Self {
        Self {
            socket: self.socket.clone(),
            patience,
        }
    }

    /// GET.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new())
    }

    /// POST.
    pub(crate) fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = encode(body);
        self.call(Method::POST, path, body)
    }

    /// PUT.
    pub(crate) fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = encode(body);
        self.call(Method::PUT, path, body)
    }

    /// DELETE.
    pub(crate) fn delete(&self, path: &str) -> Result<(), ClientError> {
        let _: serde_json::Value = self.call(Method::DELETE, path, Bytes::new())?;
        Ok(())
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let request = format!("{method} {path}");
        let answer = self.exchange(method, path, body)?;
        serde_json::from_slice(&answer).map_err(|e| ClientError::Answer {
            request,
            detail: e.to_string(),
        })
    }

    /// A runtime of its own for each request: the commands are plain, single-threaded programs, and stay so because
    /// some of them go on to change namespaces.
    fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| self.lost(source))?;
        runtime.block_on(async {
            tokio::time::timeout(self.patience, self.exchange_inside(method, path, body))
                .await
                .unwrap_or(Err(ClientError::Timeout(self.patience.as_secs())))
        })
    }

    async fn exchange_inside(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| self.refused(source))?;
        let request_line = format!("{method} {path}");
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "weft")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| ClientError::Answer {
                request: request_line.clone(),
                detail: e.to_string(),
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.lost(std::io::Error::other(e)))?;
        let driver = tokio::spawn(connection);
        let answer = sender
            .send_request(request)
            .await
            .map_err(|e| self.lost(std::io::Error::other(e)))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_BODY)
            .collect()
            .await
            .map_err(|e| ClientError::Answer {
                request: request_line.clone(),
                detail: e.to_string(),
            })?
            .to_bytes();
        driver.abort();
        if status.is_success() {
            return Ok(body);
        }
        Err(match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(error) => ClientError::Remote(error),
            Err(_) => ClientError::Answer {
                request: request_line,
                detail: format!("HTTP status {status}"),
            },
        })
    }

    fn refused(&self, source: std::io::Error) -> ClientError {
        match source.kind() {
            Io::NotFound | Io::ConnectionRefused => ClientError::NotRunning(self.socket.clone()),
            Io::PermissionDenied => ClientError::Denied(self.socket.clone()),
            _ => self.lost(source),
        }
    }

    fn lost(&self, source: std::io::Error) -> ClientError {
        ClientError::Lost {
            socket: self.socket.clone(),
            source,
        }
    }
}

fn encode(body: &impl Serialize) -> Bytes {
    Bytes::from(
        serde_json::to_vec(body)
            .expect("the API's bodies are plain structs whose maps have string keys"),
    )
}
