//! A bank on a port of its own, for the examples: it makes transfers and finds them again, does not recognize a call that
//! it has had before, and misbehaves when it is told to.

use std::{
    collections::HashMap,
    error::Error,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use tokio::net::TcpListener;
use tower_idempotency::{CallFailure, Intent, Lookup, Reconcile, Resource, UpstreamKey};

/// A client of the bank.
#[derive(Clone)]
pub(crate) struct Bank {
    url: String,
    http: legacy::Client<HttpConnector, Full<Bytes>>,
}

impl Bank {
    /// The bank at this URL.
    pub(crate) fn at(url: impl Into<String>) -> Self {
        let http = legacy::Client::builder(TokioExecutor::new()).build_http();
        Self { url: url.into(), http }
    }

    /// A new bank in this process, on this port; 0 is any.
    pub(crate) async fn open(port: u16) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        tokio::spawn(serve(listener));
        Ok(Self::at(url))
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Transfers money. What a failure says of the call must be true: only a connection that was never made is *not sent*,
    /// and whatever has no answer is *unknown*.
    pub(crate) async fn transfer(
        &self,
        key: UpstreamKey,
        order: String,
        misbehave: Option<&str>,
    ) -> Result<Resource, CallFailure> {
        let request = Request::post(format!("{}/transfers", self.url))
            .header("idempotency-key", key.to_string())
            .header("x-misbehave", misbehave.unwrap_or("no"))
            .body(Full::from(order))
            .map_err(CallFailure::not_sent)?;
        let (status, body) = self.send(request).await.map_err(|error| match error.is_connect() {
            true => CallFailure::not_sent(error),
            false => CallFailure::unknown(error),
        })?;
        let body = body.map_err(CallFailure::unknown)?;
        if status.is_success() {
            Ok(Resource::new(body))
        } else {
            Err(CallFailure::from_status(status, body))
        }
    }

    async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Result<String, hyper::Error>), legacy::Error> {
        let (parts, body) = self.http.request(request).await?.into_parts();
        let body = body.collect().await.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned());
        Ok((parts.status, body))
    }
}

/// Asks the bank what became of a transfer whose outcome is unknown. Twice, if it does not know it. It is registered under
/// the name of transfers, and is asked for nothing else.
#[async_trait::async_trait]
impl Reconcile for Bank {
    async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn Error + Send + Sync>> {
        let uri = format!("{}/transfers/{}", self.url, intent.upstream_key);
        let (status, body) = self.send(Request::get(uri).body(Full::default())?).await?;
        Ok(match status {
            StatusCode::OK => Lookup::Found(Resource::new(body?)),
            StatusCode::NOT_FOUND => Lookup::NotFound,
            _ => Lookup::Unknown,
        })
    }
}

/// What the bank has written down: its transfers, and how often it was called with each key.
#[derive(Default)]
struct Books {
    /// Key and id.
    transfers: Vec<(String, String)>,
    calls: HashMap<String, usize>,
}

async fn serve(listener: TcpListener) {
    let books = Arc::<Mutex<Books>>::default();
    while let Ok((stream, _)) = listener.accept().await {
        let books = Arc::clone(&books);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&books, request));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// An error breaks the connection off.
async fn answer(
    books: &Mutex<Books>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, &'static str> {
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if request.method() == Method::GET {
        return Ok(books.lock().unwrap_or_else(PoisonError::into_inner).show(request.uri().path()));
    }
    let (key, wish) = (header("idempotency-key"), header("x-misbehave"));
    let (id, misbehaviour) = books.lock().unwrap_or_else(PoisonError::into_inner).enter(key, wish);
    match misbehaviour {
        "4xx" => Ok(reply(402, "the account is overdrawn")),
        "5xx" | "apply-then-fail" | "forget" => Ok(reply(500, "the bank has a bad day")),
        "reset" => Err("the connection breaks"),
        "timeout" => {
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok(reply(201, &id))
        }
        _ => Ok(reply(201, &id)),
    }
}

impl Books {
    /// Makes a transfer unless the bank is to misbehave, which it does once for each key. Returns how.
    fn enter<'a>(&mut self, key: &str, wish: &'a str) -> (String, &'a str) {
        let calls = self.calls.entry(key.to_owned()).or_default();
        *calls += 1;
        let misbehaviour = if *calls == 1 { wish } else { "no" };
        let id = format!("tr_{}", self.transfers.len() + 1);
        if !matches!(misbehaviour, "4xx" | "5xx" | "reset" | "forget") {
            self.transfers.push((key.to_owned(), id.clone()));
        }
        (id, misbehaviour)
    }

    /// `/transfers/KEY` or all `/transfers`.
    fn show(&self, path: &str) -> Response<Full<Bytes>> {
        let Some(wanted) = path.strip_prefix("/transfers/") else {
            return reply(200, &format!("{:#?}\n", self.transfers));
        };
        let found = self.transfers.iter().find(|(key, _)| key == wanted);
        found.map_or_else(|| reply(404, "there is no such transfer"), |(_, id)| reply(200, id))
    }
}

fn reply(status: u16, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_owned()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
    response
}
