//! A client that repeats its request until it is answered.

use std::{
    collections::BTreeMap,
    fmt::Display,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::time::{sleep, timeout};

use crate::support::app::Answer;

/// Clones share connections and counts.
#[derive(Clone, Debug)]
pub struct Client {
    http: legacy::Client<HttpConnector, Full<Bytes>>,
    /// For how long it waits for an answer.
    patience: Duration,
    refusals: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// A request for a charge or a payout.
#[derive(Clone, Debug)]
pub struct Order {
    pub key: String,
    path: &'static str,
    /// Whether it may be refused because its outcome is unknown, until somebody has found out.
    may_be_unknown: bool,
    headers: Vec<(&'static str, String)>,
}

/// An answer, and everything of it that has to be the same in every answer to the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub answer: Answer,
    pub shown: String,
}

impl Order {
    pub fn new(key: impl Into<String>) -> Self {
        Self { key: key.into(), path: "/charges", may_be_unknown: false, headers: Vec::new() }
    }

    pub fn payout(key: impl Into<String>) -> Self {
        Self { path: "/payouts", ..Self::new(key) }
    }

    /// A payout in three phases.
    pub fn phased(key: impl Into<String>) -> Self {
        Self { path: "/phased-payouts", ..Self::new(key) }
    }

    pub fn that_may_be_unknown(self) -> Self {
        Self { may_be_unknown: true, ..self }
    }

    pub fn with(mut self, header: &'static str, value: impl Display) -> Self {
        self.headers.push((header, format!("{value}")));
        self
    }
}

impl Order {
    /// Refusals that say that the request can be sent again.
    fn expects(&self, answer: &Answer) -> bool {
        let unknown = self.may_be_unknown && answer.is_refused("outcome-unknown");
        answer.status == 503 || answer.is_refused("in-progress") || unknown
    }
}

impl Client {
    pub fn new(patience: Duration) -> Self {
        let http = legacy::Client::builder(TokioExecutor::new()).build_http();
        Self { http, patience, refusals: Arc::default() }
    }

    /// Sends the request once. Without a whole answer: why.
    pub async fn send(&self, address: SocketAddr, order: &Order) -> Result<Reply, String> {
        let mut request = Request::post(format!("http://{address}{}", order.path))
            .header("idempotency-key", &order.key)
            .header(header::CONTENT_TYPE, "application/json");
        for (name, value) in &order.headers {
            request = request.header(*name, value);
        }
        let request = request.body(Full::from(r#"{"amount":2000}"#)).expect("a request can be made");
        let reply = async {
            let response = self.http.request(request).await.map_err(|error| error.to_string())?;
            let (parts, body) = response.into_parts();
            let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
            Ok(reply(Response::from_parts(parts, body)))
        };
        timeout(self.patience, reply).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }

    /// Repeats the request, at another address each time, until it succeeds. What it says besides its key is said once.
    pub async fn insist(
        &self,
        addresses: &[SocketAddr],
        order: Order,
        until: Instant,
    ) -> Result<Reply, String> {
        let mut order = order;
        let mut seen = Vec::new();
        for address in addresses.iter().cycle() {
            match self.send(*address, &order).await {
                Ok(reply) if reply.answer.status == 201 => return Ok(reply),
                Ok(Reply { answer, .. }) => {
                    let refusal =
                        format!("{} {}", answer.status, answer.code.as_deref().unwrap_or("handler"));
                    self.count(&refusal);
                    if !order.expects(&answer) {
                        return Err(format!("{refusal}: {:?}", answer.body));
                    }
                    seen.push(refusal);
                }
                Err(error) => {
                    self.count("no answer");
                    seen.push(error);
                }
            }
            if Instant::now() > until {
                break;
            }
            order.headers.clear();
            sleep(Duration::from_millis(20 + backoff_ms(seen.len()))).await;
        }
        seen.dedup();
        Err(format!("gave up after {seen:?}"))
    }

    fn count(&self, refusal: &str) {
        *self.refusals.lock().unwrap().entry(refusal.to_owned()).or_default() += 1;
    }

    /// What clients were told instead of a success, and how often.
    pub fn refusals(&self) -> String {
        let refusals = self.refusals.lock().unwrap();
        if refusals.is_empty() {
            return "nothing else".to_owned();
        }
        refusals.iter().map(|(refusal, count)| format!("{refusal} × {count}")).collect::<Vec<_>>().join(", ")
    }
}

/// Grows with the number of tries.
fn backoff_ms(tries: usize) -> u64 {
    (tries.min(10) * 10) as u64
}

fn reply(response: Response<Bytes>) -> Reply {
    let answer = Answer::from(&response);
    let (mut parts, body) = response.into_parts();
    for name in ["date", "idempotent-replayed"] {
        parts.headers.remove(name);
    }
    Reply { answer, shown: format!("{} {:?} {body:?}", parts.status, parts.headers) }
}
