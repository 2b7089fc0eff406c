//! An upstream service that makes transfers, on a real socket, and its client as handlers use it.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    future::pending,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    time::timeout,
};
use tower_idempotency::{CallFailure, Resource, UpstreamKey};
use uuid::Uuid;

/// Makes transfers for `POST /transfers` and looks them up for `GET /transfers?key=KEY`. Clones share everything.
#[derive(Clone, Debug)]
pub struct Upstream {
    address: SocketAddr,
    deduplicates: bool,
    state: Arc<Mutex<State>>,
    /// Changes with each request for a transfer.
    received: watch::Sender<usize>,
    listening: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    acts: VecDeque<Act>,
    acts_for: HashMap<String, VecDeque<Act>>,
    looks: VecDeque<Look>,
    requests: Vec<Asked>,
    transfers: Vec<Transfer>,
    lookups: usize,
}

/// A request for a transfer, as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub key: UpstreamKey,
    /// What it was asked for.
    pub reference: String,
}

/// A transfer that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    pub id: String,
    pub key: UpstreamKey,
    pub reference: String,
}

/// What becomes of a request for a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Act {
    applies: bool,
    forgets: bool,
    ending: Ending,
}

/// How a request ends for who has sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this status.
    Status(u16),
    /// With a reset of the connection.
    Reset,
    /// Without an answer, on a connection that stays open.
    Silence,
}

/// What a look-up says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// What is so.
    Truth,
    /// That there is no such transfer.
    NotFound,
    /// Nothing: it fails with a 503.
    Fails,
}

impl Act {
    /// Makes the transfer and says so.
    pub const WORK: Self = Self { applies: true, forgets: false, ending: Ending::Status(201) };
    /// Makes the transfer, says so, and loses it.
    pub const FORGET: Self = Self { applies: true, forgets: true, ending: Ending::Status(201) };

    /// Makes no transfer.
    pub const fn before(ending: Ending) -> Self {
        Self { applies: false, forgets: false, ending }
    }

    /// Makes the transfer first.
    pub const fn after(ending: Ending) -> Self {
        Self { applies: true, forgets: false, ending }
    }
}

impl Upstream {
    /// One that makes a single transfer for each key.
    pub async fn deduplicating() -> Self {
        Self::start(true).await
    }

    /// One that makes a transfer for each request.
    pub async fn not_deduplicating() -> Self {
        Self::start(false).await
    }

    pub async fn start(deduplicates: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let upstream = Self {
            address: listener.local_addr().expect("a listener has an address"),
            deduplicates,
            state: Arc::default(),
            received: watch::Sender::new(0),
            listening: watch::Sender::new(true),
        };
        tokio::spawn(upstream.clone().listen(listener));
        upstream
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn deduplicates(&self) -> bool {
        self.deduplicates
    }

    pub fn client(&self) -> UpstreamClient {
        UpstreamClient::new(self.address)
    }

    /// What is done with the next request for which nothing else was said. It does its work when nothing is left.
    pub fn then(&self, act: Act) {
        self.state().acts.push_back(act);
    }

    /// What is done with the next request for a transfer with this reference.
    pub fn then_for(&self, reference: &str, act: Act) {
        self.state().acts_for.entry(reference.to_owned()).or_default().push_back(act);
    }

    /// What the next look-up says. It tells the truth when nothing is left.
    pub fn then_look(&self, look: Look) {
        self.state().looks.push_back(look);
    }

    /// Refuses connections.
    pub fn stop_listening(&self) {
        self.listening.send_replace(false);
    }

    /// Ends [`stop_listening`](Self::stop_listening).
    pub fn listen_again(&self) {
        self.listening.send_replace(true);
    }

    /// Every request for a transfer, in the order of their arrival.
    pub fn requests(&self) -> Vec<Asked> {
        self.state().requests.clone()
    }

    /// How many requests for a transfer were received.
    pub fn calls(&self) -> usize {
        self.state().requests.len()
    }

    /// How many requests for a transfer with this reference were received.
    pub fn calls_for(&self, reference: &str) -> usize {
        self.state().requests.iter().filter(|asked| asked.reference == reference).count()
    }

    /// Every transfer that was made and not lost.
    pub fn transfers(&self) -> Vec<Transfer> {
        self.state().transfers.clone()
    }

    /// Those with this reference.
    pub fn transfers_for(&self, reference: &str) -> Vec<Transfer> {
        self.state().transfers.iter().filter(|made| made.reference == reference).cloned().collect()
    }

    /// How often it was looked for a transfer.
    pub fn lookups(&self) -> usize {
        self.state().lookups
    }

    /// Waits until so many requests for a transfer were received.
    pub async fn until_called(&self, calls: usize) {
        let mut received = self.received.subscribe();
        let reached = timeout(PATIENCE, received.wait_for(|received| *received >= calls)).await;
        assert!(reached.is_ok(), "the upstream was called {} times instead of {calls}", self.calls());
    }

    /// Waits until so many requests for a transfer with this reference were received.
    pub async fn until_called_for(&self, reference: &str, calls: usize) {
        let mut received = self.received.subscribe();
        let reached = timeout(PATIENCE, received.wait_for(|_| self.calls_for(reference) >= calls)).await;
        assert!(
            reached.is_ok(),
            "{reference}: called {} times instead of {calls}",
            self.calls_for(reference)
        );
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn listen(self, listener: TcpListener) {
        let mut listener = Some(listener);
        let mut listening = self.listening.subscribe();
        loop {
            if !*listening.borrow_and_update() {
                listener = None;
                if listening.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let open = match listener.take() {
                Some(open) => open,
                None => TcpListener::bind(self.address).await.expect("the port is still free"),
            };
            tokio::select! {
                accepted = open.accept() => {
                    if let Ok((stream, _)) = accepted {
                        tokio::spawn(self.clone().converse(stream));
                    }
                }
                _ = listening.changed() => {}
            }
            listener = Some(open);
        }
    }

    async fn converse(self, stream: TcpStream) {
        let reset = Notify::new();
        let service = service_fn(|request| self.answer(request, &reset));
        let mut conversation = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::select! {
            _ = &mut conversation => {}
            () = reset.notified() => {
                let stream = conversation.into_parts().io.into_inner();
                stream.set_zero_linger().expect("a connection can be configured");
            }
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        reset: &Notify,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        if request.method() == Method::GET {
            return Ok(self.look_up(request.uri().query().unwrap_or_default()));
        }
        let key = request.headers().get("idempotency-key").and_then(|key| key.to_str().ok()?.parse().ok());
        let Some(key) = key.map(UpstreamKey::from_uuid) else {
            return Ok(reply(400, "there is no Idempotency-Key, or it is no UUID"));
        };
        let Ok(body) = request.into_body().collect().await else {
            return Ok(reply(400, "the body broke off"));
        };
        let reference = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        let (act, id) = self.receive(Asked { key, reference });
        match act.ending {
            Ending::Status(201) => Ok(reply(201, &id.unwrap_or_default())),
            Ending::Status(status) => Ok(reply(status, "told to")),
            Ending::Reset => {
                reset.notify_one();
                pending().await
            }
            Ending::Silence => pending().await,
        }
    }

    /// Writes down what was asked for, and makes the transfer if it is to be made.
    fn receive(&self, asked: Asked) -> (Act, Option<String>) {
        let mut state = self.state();
        let own = state.acts_for.get_mut(&asked.reference).and_then(VecDeque::pop_front);
        let act = own.or_else(|| state.acts.pop_front()).unwrap_or(Act::WORK);
        let known = state.transfers.iter().find(|made| self.deduplicates && made.key == asked.key);
        let mut id = known.map(|made| made.id.clone());
        if act.applies && id.is_none() {
            let made = id.insert(format!("tr_{}", Uuid::new_v4().simple())).clone();
            if !act.forgets {
                let Asked { key, reference } = asked.clone();
                state.transfers.push(Transfer { id: made, key, reference });
            }
        }
        state.requests.push(asked);
        let received = state.requests.len();
        drop(state);
        self.received.send_replace(received);
        (act, id)
    }

    fn look_up(&self, query: &str) -> Response<Full<Bytes>> {
        let mut state = self.state();
        state.lookups += 1;
        match state.looks.pop_front().unwrap_or(Look::Truth) {
            Look::Truth => {
                let wanted = query.strip_prefix("key=").unwrap_or_default();
                let found = state.transfers.iter().find(|made| made.key.to_string() == wanted);
                found.map_or_else(|| reply(404, "there is no such transfer"), |made| reply(200, &made.id))
            }
            Look::NotFound => reply(404, "there is no such transfer"),
            Look::Fails => reply(503, "look-ups are out of order"),
        }
    }
}

/// Calls an upstream, and tells honestly what is known of a call that has no answer.
#[derive(Clone, Debug)]
pub struct UpstreamClient {
    http: legacy::Client<HttpConnector, Full<Bytes>>,
    address: SocketAddr,
}

impl UpstreamClient {
    pub fn new(address: SocketAddr) -> Self {
        // A connection for each call: one that was used before may turn out to be closed.
        let http = legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
        Self { http, address }
    }

    /// Asks for a transfer.
    pub async fn transfer(&self, key: UpstreamKey, reference: &str) -> Result<Resource, CallFailure> {
        let request = Request::post(format!("http://{}/transfers", self.address))
            .header("idempotency-key", key.to_string())
            .body(Full::from(reference.to_owned()))
            .map_err(CallFailure::not_sent)?;
        let response = self.http.request(request).await.map_err(|error| match error.is_connect() {
            true => CallFailure::not_sent(error),
            false => CallFailure::unknown(error),
        })?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(CallFailure::unknown)?.to_bytes();
        let text = String::from_utf8_lossy(&body);
        if status.is_success() {
            Ok(Resource::new(text))
        } else {
            Err(CallFailure::from_status(status, text))
        }
    }

    /// The id of the transfer that was asked for with this key, if there is one.
    pub async fn look_up(&self, key: UpstreamKey) -> Result<Option<String>, String> {
        let uri = format!("http://{}/transfers?key={key}", self.address);
        let request = Request::get(uri).body(Full::default()).map_err(|error| error.to_string())?;
        let response = self.http.request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
        match status {
            StatusCode::OK => Ok(Some(String::from_utf8_lossy(&body).into_owned())),
            StatusCode::NOT_FOUND => Ok(None),
            unexpected => Err(unexpected.to_string()),
        }
    }
}

fn reply(status: u16, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_owned()));
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

const PATIENCE: Duration = Duration::from_secs(30);
