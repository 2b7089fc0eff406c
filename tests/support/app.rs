//! A small application behind the layer, in the test's own process, whose handler the test directs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    http::{Response, StatusCode, header},
    routing::post,
};
use bytes::Bytes;
use tokio::{
    sync::{Barrier, watch},
    time::sleep,
};
use tower_idempotency::{
    Consumer, Idempotency, IdempotencyHandle, IdempotencyKey, IdempotencyLayer,
    store::{IntoStore, Record},
};
use uuid::Uuid;

use super::{direct, http::RawResponse};

/// One node: a handler behind a layer. Its answers tell the runs apart.
#[derive(Clone, Debug)]
pub struct App {
    router: Router,
    pub handle: IdempotencyHandle,
    stage: Arc<Stage>,
}

/// What the handler does, and how often it was called; shared by the nodes of a test.
#[derive(Debug)]
struct Stage {
    runs: watch::Sender<usize>,
    open: watch::Sender<bool>,
    status: AtomicU16,
}

impl App {
    /// A node whose handler takes 20 ms.
    pub fn new(layer: IdempotencyLayer) -> Self {
        let stage = Stage {
            runs: watch::Sender::new(0),
            open: watch::Sender::new(true),
            status: AtomicU16::new(StatusCode::CREATED.as_u16()),
        };
        Self::on(Arc::new(stage), layer)
    }

    /// Another node with the same handler.
    pub fn beside(&self, layer: IdempotencyLayer) -> Self {
        Self::on(Arc::clone(&self.stage), layer)
    }

    fn on(stage: Arc<Stage>, layer: IdempotencyLayer) -> Self {
        let handle = layer.handle();
        let shared = Arc::clone(&stage);
        let handler = move |idempotency: Idempotency| async move { shared.perform(&idempotency).await };
        Self { router: Router::new().route("/charges", post(handler)).layer(layer), handle, stage }
    }

    /// Handlers that are running, and those to come, wait for [`open`](Self::open).
    pub fn close(&self) {
        self.stage.open.send_replace(false);
    }

    /// Lets handlers return.
    pub fn open(&self) {
        self.stage.open.send_replace(true);
    }

    /// What handlers that return from now on answer.
    pub fn answer_with(&self, status: StatusCode) {
        self.stage.status.store(status.as_u16(), Ordering::SeqCst);
    }

    /// How many handlers were started.
    pub fn runs(&self) -> usize {
        *self.stage.runs.borrow()
    }

    /// Waits until that many handlers were started.
    pub async fn until_started(&self, runs: usize) {
        let mut started = self.stage.runs.subscribe();
        let waited = tokio::time::timeout(PATIENCE, started.wait_for(|started| *started >= runs)).await;
        assert!(waited.is_ok(), "waited in vain for run {runs}");
    }

    /// Sends the request with this key.
    pub async fn send(&self, key: &str) -> Answer {
        let answer = tokio::time::timeout(PATIENCE, direct::send(&self.router, direct::charge(key))).await;
        answer.expect("an answer").into()
    }

    /// Sends the request with this key in a task of its own.
    pub fn start(&self, key: &'static str) -> tokio::task::JoinHandle<Answer> {
        let app = self.clone();
        tokio::spawn(async move { app.send(key).await })
    }

    /// The record of this key.
    pub async fn record(&self, key: &str) -> Option<Record> {
        self.handle.get(&consumer(), &IdempotencyKey::new(key).unwrap()).await.unwrap()
    }
}

impl Stage {
    async fn perform(&self, idempotency: &Idempotency) -> (StatusCode, String) {
        let mut run = 0;
        self.runs.send_modify(|runs| {
            *runs += 1;
            run = *runs;
        });
        sleep(Duration::from_millis(20)).await;
        let _ = self.open.subscribe().wait_for(|open| *open).await;
        let status = StatusCode::from_u16(self.status.load(Ordering::SeqCst)).unwrap();
        (status, format!("run {run} {} {}", idempotency.key(), Uuid::new_v4()))
    }
}

/// A layer with a lease of 1 s.
pub fn layer(store: impl IntoStore) -> IdempotencyLayer {
    IdempotencyLayer::new(store).with_lease(Duration::from_secs(1))
}

/// The consumer of requests without credentials.
pub fn consumer() -> Consumer {
    Consumer::anonymous()
}

/// What a client got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub replayed: bool,
    pub retry_after: Option<String>,
    /// Why it was refused, if it was.
    pub code: Option<String>,
    pub body: Bytes,
}

impl Answer {
    pub fn is_refused(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }

    #[track_caller]
    pub fn assert_refused(&self, code: &str) {
        assert!(self.is_refused(code), "not refused as {code}: {self:?}");
    }

    /// A run's own answer.
    pub fn is_first(&self) -> bool {
        self.status == 201 && !self.replayed
    }

    pub fn is_replay(&self) -> bool {
        self.status == 201 && self.replayed
    }
}

impl From<direct::Answer> for Answer {
    fn from(answer: direct::Answer) -> Self {
        let retry_after = answer.headers.get(header::RETRY_AFTER);
        Self {
            status: answer.status.as_u16(),
            replayed: answer.headers.contains_key("idempotent-replayed"),
            retry_after: retry_after.map(|value| value.to_str().unwrap().to_owned()),
            code: answer.rejection.map(|code| code.as_str().to_owned()),
            body: answer.body,
        }
    }
}

impl From<&Response<Bytes>> for Answer {
    fn from(response: &Response<Bytes>) -> Self {
        let text = |name| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let is_problem = text(header::CONTENT_TYPE).as_deref() == Some("application/problem+json");
        let problem =
            is_problem.then(|| serde_json::from_slice::<serde_json::Value>(response.body()).unwrap());
        Self {
            status: response.status().as_u16(),
            replayed: response.headers().contains_key("idempotent-replayed"),
            retry_after: text(header::RETRY_AFTER),
            code: problem.and_then(|problem| problem["code"].as_str().map(str::to_owned)),
            body: response.body().clone(),
        }
    }
}

impl From<RawResponse> for Answer {
    fn from(response: RawResponse) -> Self {
        let is_problem = response.header("content-type") == Some("application/problem+json");
        let code = is_problem.then(|| response.json()["code"].as_str().map(str::to_owned));
        Self {
            status: response.status,
            replayed: response.header("idempotent-replayed").is_some(),
            retry_after: response.header("retry-after").map(str::to_owned),
            code: code.flatten(),
            body: response.body.into(),
        }
    }
}

/// The answers to that many requests that are sent at once.
pub async fn at_once<F>(count: usize, send: impl Fn(usize) -> F) -> Vec<Answer>
where
    F: Future<Output = Answer> + Send + 'static,
{
    let barrier = Arc::new(Barrier::new(count));
    let tasks: Vec<_> = (0..count)
        .map(|number| {
            let (barrier, request) = (Arc::clone(&barrier), send(number));
            tokio::spawn(async move {
                barrier.wait().await;
                request.await
            })
        })
        .collect();
    all(tasks).await
}

/// The answers to that many requests, sent one after the other over a span that begins now, none waiting for another.
pub async fn over<F>(span: Duration, count: usize, send: impl Fn(usize) -> F) -> Vec<Answer>
where
    F: Future<Output = Answer> + Send + 'static,
{
    let mut tasks = Vec::new();
    for number in 0..count {
        tasks.push(tokio::spawn(send(number)));
        sleep(span / u32::try_from(count).unwrap()).await;
    }
    all(tasks).await
}

async fn all(tasks: Vec<tokio::task::JoinHandle<Answer>>) -> Vec<Answer> {
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap());
    }
    answers
}

/// Sends until the answer is something else than a refusal with one of these codes.
pub async fn send_until_not<F>(codes: &[&str], send: impl Fn() -> F) -> Answer
where
    F: Future<Output = Answer>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = send().await;
        if !codes.iter().any(|code| answer.is_refused(code)) {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain, the last answer is {answer:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Checks that one request was performed and that every other one got 409 or the very same answer, and returns it.
#[track_caller]
pub fn assert_one_run(answers: &[Answer]) -> Bytes {
    let first: Vec<_> = answers.iter().filter(|answer| answer.is_first()).collect();
    assert_eq!(first.len(), 1, "{answers:#?}");
    for answer in answers.iter().filter(|answer| !answer.is_first()) {
        let replay = answer.is_replay() && answer.body == first[0].body;
        assert!(replay || answer.is_refused("in-progress"), "{answer:?}");
    }
    first[0].body.clone()
}

const PATIENCE: Duration = Duration::from_secs(30);
