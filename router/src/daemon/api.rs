//! The control API: HTTP/JSON under `/v1` on a socket that only root can open. Routes and bodies: `weft_core::control`.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path as UrlPath, Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};
use weft_core::control::{
    AttachRequest, CheckRequest, DetachRequest, ErrorBody, ErrorKind, MAX_BODY, NameSpec,
    NetworkSpec, RemoveRequest, ServiceSpec, TokenRequest,
};
use weft_core::model::Label;
use weft_core::node::CommandError;

use super::Daemon;
use super::handover::PROTOCOL;

/// Clients served at the same time; more wait at the door.
const MAX_CLIENTS: usize = 64;
/// A client that has not sent its request's head by then is let go.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);

/// What a handler gives back.
type Answer<T> = Result<Json<T>, ApiError>;

/// An error on its way to the client.
pub(crate) struct ApiError(pub(crate) CommandError);

impl ApiError {
    /// With a kind and a line for people.
    pub(crate) fn new(kind: ErrorKind, error: impl Into<String>) -> Self {
        Self(CommandError {
            kind,
            text: error.into(),
        })
    }
}

impl From<CommandError> for ApiError {
    fn from(error: CommandError) -> Self {
        Self(error)
    }
}

impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> Self {
        Self::new(ErrorKind::Internal, format!("{error:#}"))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (
            status,
            Json(ErrorBody {
                error: self.0.text,
                kind: self.0.kind,
            }),
        )
            .into_response()
    }
}

/// A JSON body whose every fault comes back as an [`ErrorBody`].
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(JsonRejection::BytesRejection(_)) => Err(ApiError::new(
                ErrorKind::Invalid,
                format!("the body is larger than {MAX_BODY} octets"),
            )),
            Err(error) => Err(ApiError::new(ErrorKind::Invalid, error.body_text())),
        }
    }
}

/// Makes the socket, replacing one that a dead daemon left; `given` is one that a predecessor made there.
pub(crate) fn listen(
    path: &Path,
    given: Option<OwnedFd>,
) -> Result<std::os::unix::net::UnixListener> {
    if let Some(given) = given {
        return Ok(given.into());
    }
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            bail!(
                "another weft daemon answers on {}; see `weft status`",
                path.display()
            );
        }
        fs::remove_file(path).with_context(|| format!("can't replace {}", path.display()))?;
    }
    let listener = std::os::unix::net::UnixListener::bind(path)
        .with_context(|| format!("can't listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub(crate) async fn serve(listener: UnixListener, daemon: Arc<Daemon>) {
    let router = router(daemon);
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) if may_command(&stream) => {
                let router = router.clone();
                tokio::spawn(async move {
                    talk(stream, router).await;
                    drop(place);
                });
            }
            Ok(_) => warn!("refused a client of the control socket that is not root"),
            Err(error) => {
                warn!(%error, "the control socket can't accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn talk(stream: UnixStream, router: Router) {
    let service = TowerToHyperService::new(router);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        // A client that has said all may close its half and still wants the answer.
        .half_close(true)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        debug!(%error, "a client of the control socket went wrong");
    }
}

/// The socket's mode keeps others out; this holds even where somebody changed the mode.
fn may_command(stream: &UnixStream) -> bool {
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw())
}

fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/peers", get(peers))
        .route("/v1/endpoints", get(endpoints))
        .route("/v1/nodes", get(nodes))
        .route("/v1/token", post(token))
        .route("/v1/attach", post(attach))
        .route("/v1/detach", post(detach))
        .route("/v1/check", post(check))
        .route("/v1/services", get(services).post(create_service))
        .route(
            "/v1/services/{name}",
            put(update_service).delete(remove_service),
        )
        .route("/v1/names", get(names).post(add_name))
        .route("/v1/names/{name}", axum::routing::delete(remove_name))
        .route("/v1/nodes/remove", post(remove_node))
        .route("/v1/leave", post(leave))
        .route("/v1/networks", get(networks).post(create_network))
        .route("/v1/networks/{name}", axum::routing::delete(remove_network))
        .route("/v1/down", post(down))
        .route("/v1/asked", get(asked))
        .route("/v1/handover", post(handover))
        .fallback(|| async {
            ApiError::new(ErrorKind::NotFound, "no such path; the API is under /v1")
        })
        .method_not_allowed_fallback(|| async {
            ApiError::new(ErrorKind::Invalid, "no such method on this path")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(daemon)
}

#[derive(Serialize)]
struct Empty {}

async fn status(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.status().await?))
}

async fn peers(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.peers().await?))
}

async fn endpoints(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.endpoints()?))
}

async fn nodes(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.nodes()?))
}

async fn remove_node(
    State(daemon): State<Arc<Daemon>>,
    Body(request): Body<RemoveRequest>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.remove_node(request).await?))
}

async fn leave(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    daemon.leave().await?;
    Ok(Json(Empty {}))
}

async fn services(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.services()?))
}

async fn names(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.names()?))
}

async fn token(
    State(daemon): State<Arc<Daemon>>,
    Body(request): Body<TokenRequest>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.token(request).await?))
}

async fn attach(
    State(daemon): State<Arc<Daemon>>,
    Body(request): Body<AttachRequest>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.attach(request).await?))
}

async fn detach(
    State(daemon): State<Arc<Daemon>>,
    Body(request): Body<DetachRequest>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.detach(request.which).await?))
}

async fn check(
    State(daemon): State<Arc<Daemon>>,
    Body(request): Body<CheckRequest>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.check(request.which).await?))
}

async fn create_service(
    State(daemon): State<Arc<Daemon>>,
    Body(spec): Body<ServiceSpec>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.create_service(spec).await?))
}

async fn update_service(
    State(daemon): State<Arc<Daemon>>,
    UrlPath(name): UrlPath<String>,
    Body(spec): Body<ServiceSpec>,
) -> Answer<impl Serialize> {
    if name != spec.name.as_str() {
        return Err(ApiError::new(
            ErrorKind::Invalid,
            "the name in the path and in the body differ",
        ));
    }
    Ok(Json(daemon.update_service(spec).await?))
}

async fn remove_service(
    State(daemon): State<Arc<Daemon>>,
    UrlPath(name): UrlPath<String>,
) -> Answer<impl Serialize> {
    daemon.remove_service(label(&name)?).await?;
    Ok(Json(Empty {}))
}

async fn networks(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.networks()?))
}

async fn create_network(
    State(daemon): State<Arc<Daemon>>,
    Body(spec): Body<NetworkSpec>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.create_network(spec).await?))
}

async fn remove_network(
    State(daemon): State<Arc<Daemon>>,
    UrlPath(name): UrlPath<String>,
) -> Answer<impl Serialize> {
    daemon.remove_network(label(&name)?).await?;
    Ok(Json(Empty {}))
}

async fn add_name(
    State(daemon): State<Arc<Daemon>>,
    Body(spec): Body<NameSpec>,
) -> Answer<impl Serialize> {
    Ok(Json(daemon.add_name(spec).await?))
}

async fn remove_name(
    State(daemon): State<Arc<Daemon>>,
    UrlPath(name): UrlPath<String>,
) -> Answer<impl Serialize> {
    daemon.remove_name(label(&name)?).await?;
    Ok(Json(Empty {}))
}

async fn down(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    daemon.down().await?;
    Ok(Json(Empty {}))
}

async fn asked(State(daemon): State<Arc<Daemon>>) -> Answer<impl Serialize> {
    Ok(Json(daemon.asked.clone()))
}

async fn handover(
    State(daemon): State<Arc<Daemon>>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let asks = request
        .headers()
        .get(UPGRADE)
        .is_some_and(|to| to == PROTOCOL);
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (true, Some(upgrade)) = (asks, upgrade) else {
        return Err(ApiError::new(
            ErrorKind::Invalid,
            format!("a handover is an upgrade of the connection to {PROTOCOL}"),
        ));
    };
    tokio::spawn(daemon.hand_over(upgrade));
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

fn label(text: &str) -> Result<Label, ApiError> {
    Label::parse(text).map_err(|error| ApiError::new(ErrorKind::Invalid, error.to_string()))
}
