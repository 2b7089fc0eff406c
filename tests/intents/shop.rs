//! An application with an authentication layer outside its idempotency layer, whose processes can die.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::pending,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, RawQuery, Request},
    http::{HeaderMap, StatusCode, header},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use http_body_util::BodyExt;
use sqlx::{Pool, Postgres, Sqlite};
use tokio::runtime::Runtime;
use tokio_stream::Stream;
use tower_idempotency::{
    Consumer, ConsumerExtractor, Fingerprinter, Idempotency, IdempotencyHandle, IdempotencyKey,
    IdempotencyLayer, Reaper, RejectionCode,
    recovery::{Completer, CompleterPass, KeptRequests, Refused, Restore},
    store::{Record, RecordState, Store},
};
use uuid::Uuid;

use crate::support::{
    db::Db,
    direct::{self, Answer},
    served::Count,
};

/// A database, and what the handlers of its nodes do.
pub(crate) struct Shop<DB: Db> {
    home: DB::Home,
    pub(crate) watcher: Pool<DB>,
    pub(crate) stage: Stage,
}

/// What handlers do one after the other, shared by the nodes of a test.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stage {
    pub(crate) runs: Count,
    script: Arc<Mutex<VecDeque<Act>>>,
}

/// What a handler does. Without a script it answers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// Never returns.
    Hang,
    /// Calls an upstream that does not deduplicate, and never returns.
    HangInCall,
    /// Answers 500.
    Fail,
    /// Answers 500 after a call to an upstream.
    CallAndFail,
    Panic,
    /// Takes so many milliseconds.
    Slow(u64),
}

/// One node.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) app: Router,
    pub(crate) handle: IdempotencyHandle,
}

/// Set by the authentication layer.
#[derive(Clone, Debug)]
pub(crate) struct UserId(pub(crate) String);

/// The tokens of users are their names behind this.
pub(crate) const TOKEN: &str = "token-9f86d081-";

impl<DB: Db> Shop<DB> {
    pub(crate) async fn open() -> Self {
        let home = DB::home().await;
        let watcher = DB::pool(&home, 2);
        Self { home, watcher, stage: Stage::default() }
    }

    pub(crate) fn store(&self) -> Arc<dyn Store> {
        DB::store(&DB::pool(&self.home, 4))
    }

    /// A layer that keeps requests, and whose leases are short: for processes that die.
    pub(crate) fn layer(&self) -> IdempotencyLayer {
        let kept = KeptRequests::new().with_abandoned_after(Duration::from_millis(1));
        IdempotencyLayer::new(self.store())
            .with_lease(LEASE)
            .with_consumer(ConsumerExtractor::extension())
            .with_fingerprint(Fingerprinter::default().add_header(TENANT))
            .with_kept_requests(kept)
            .with_reaper(Reaper::off())
    }

    pub(crate) fn node(&self) -> Node {
        Node::new(self.layer().with_lease(Duration::from_secs(30)), &self.stage)
    }

    /// Sends the request to a process of its own, which dies while the handler does this.
    pub(crate) async fn abandon(&self, act: Act, request: Request) {
        self.abandon_behind(self.layer(), act, request).await;
    }

    pub(crate) async fn abandon_behind(&self, layer: IdempotencyLayer, act: Act, request: Request) {
        self.stage.then([act]);
        let (runs, stage) = (self.stage.runs.get(), self.stage.clone());
        let process = Runtime::new().unwrap();
        process.spawn(async move {
            let node = Node::new(layer, &stage);
            // Otherwise the first claim, which has less than a lease, would set the tables up.
            node.handle.prepare().await.unwrap();
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let again = || Request::from_parts(parts.clone(), Body::from_stream(pieces(&body)));
            let mut answer = node.send(again()).await;
            // A busy machine may need longer for a claim than a short lease allows.
            while answer.rejection == Some(RejectionCode::StoreUnavailable) {
                answer = node.send(again()).await;
            }
            panic!("answered although it was to hang: {answer:?}");
        });
        until("the handler to run", async || self.stage.runs.get() > runs).await;
        if matches!(act, Act::HangInCall) {
            until("the call", async || self.number("SELECT count(*) FROM idempotency_intents").await > 0)
                .await;
        }
        process.shutdown_background();
    }

    pub(crate) async fn run(&self, sql: &str) {
        DB::run(&mut *self.watcher.acquire().await.unwrap(), sql).await.unwrap();
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        DB::number(&mut *self.watcher.acquire().await.unwrap(), sql).await.unwrap()
    }

    pub(crate) async fn kept_requests(&self) -> i64 {
        self.number("SELECT count(*) FROM idempotency_requests").await
    }
}

impl Stage {
    pub(crate) fn then(&self, acts: impl IntoIterator<Item = Act>) {
        self.script.lock().unwrap().extend(acts);
    }

    async fn perform(self, idempotency: Idempotency, answer: String) -> Response {
        let act = self.script.lock().unwrap().pop_front();
        let run = self.runs.add();
        match act {
            Some(Act::Hang) => pending().await,
            Some(Act::HangInCall) => {
                let _ = idempotency.intent("transfer").call(async |_| pending().await).await;
            }
            Some(Act::Fail) => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            Some(Act::CallAndFail) => {
                idempotency.intent("transfer").call(async |_| Ok("tr_1".into())).await.unwrap();
                return StatusCode::INTERNAL_SERVER_ERROR.into_response();
            }
            Some(Act::Panic) => panic!("as the test wants it"),
            Some(Act::Slow(millis)) => tokio::time::sleep(Duration::from_millis(millis)).await,
            None => {}
        }
        let headers = [("x-run", run.to_string()), ("content-type", "text/x-charge".to_owned())];
        (StatusCode::CREATED, headers, format!("{answer} {}", Uuid::new_v4())).into_response()
    }
}

impl Node {
    pub(crate) fn new(layer: IdempotencyLayer, stage: &Stage) -> Self {
        let handle = layer.handle();
        Self { app: guarded(stage, |router| router.layer(layer)), handle }
    }

    pub(crate) async fn send(&self, request: Request) -> Answer {
        direct::send(&self.app, request).await
    }

    pub(crate) fn completer(&self) -> Completer {
        self.completer_with(restore_user)
    }

    /// A completer that does not wait long.
    pub(crate) fn completer_with(
        &self,
        restore: impl Fn(&Consumer) -> Result<UserId, Refused> + Send + Sync + 'static,
    ) -> Completer {
        completer(self.app.clone(), restore)
    }

    /// Looks for abandoned requests until so many were found, and returns what became of them.
    pub(crate) async fn complete(&self, completer: &Completer, count: u64) -> CompleterPass {
        let mut sum = CompleterPass::default();
        until("abandoned requests", async || {
            let pass = self.handle.complete_abandoned(completer).await.unwrap();
            sum.taken += pass.taken;
            sum.completed += pass.completed;
            sum.again += pass.again;
            sum.held += pass.held;
            sum.gone += pass.gone;
            sum.need_attention += pass.need_attention;
            sum.failed += pass.failed;
            sum.taken >= count
        })
        .await;
        sum
    }

    pub(crate) async fn record(&self, user: &str, key: &str) -> Option<Record> {
        let (consumer, key) = (Consumer::new(user).unwrap(), IdempotencyKey::new(key).unwrap());
        self.handle.get(&consumer, &key).await.unwrap()
    }

    /// Whether the record's lease is over.
    pub(crate) async fn is_abandoned(&self, user: &str, key: &str) -> bool {
        let state = self.record(user, key).await.unwrap().state;
        matches!(state, RecordState::InProgress { lease_remaining, .. } if lease_remaining.is_zero())
    }

    /// Why requests wait for an operator.
    pub(crate) async fn needs(&self) -> Vec<String> {
        let requests = self.handle.list_requests(10).await.unwrap();
        requests.into_iter().filter_map(|request| request.attention).collect()
    }

    /// Checks that retries get the stored response of that run, byte for byte, and returns its body.
    pub(crate) async fn assert_replays(
        &self,
        request: impl Fn() -> Request,
        user: &str,
        key: &str,
    ) -> String {
        let record = self.record(user, key).await.unwrap();
        let stored = record.response().unwrap().unwrap();
        let retry = self.send(request()).await;
        let mut headers = retry.headers.clone();
        assert_eq!(headers.remove("idempotent-replayed").unwrap(), "true", "{retry:?}");
        assert_eq!(headers.remove("content-length").unwrap(), retry.body.len().to_string().as_str());
        assert_eq!((retry.status, headers), (stored.status, stored.headers));
        let tower_idempotency::store::StoredBody::Kept { data, .. } = stored.body else {
            panic!("{record:?}")
        };
        assert_eq!(retry.body, data);
        String::from_utf8(data.to_vec()).unwrap()
    }
}

pub(crate) fn guarded(stage: &Stage, guard: impl FnOnce(Router) -> Router) -> Router {
    let stage = stage.clone();
    let handler = move |idempotency: Option<Idempotency>,
                        Extension(UserId(user)): Extension<UserId>,
                        Path(account): Path<String>,
                        RawQuery(query): RawQuery,
                        headers: HeaderMap,
                        body: String| async move {
        let language = headers.get("accept-language").map(|value| value.to_str().unwrap());
        let answer = format!("{user} {account} {query:?} {language:?} {body}");
        match idempotency {
            Some(idempotency) => stage.perform(idempotency, answer).await,
            None => (StatusCode::ACCEPTED, answer).into_response(),
        }
    };
    let accounts = guard(Router::new().route("/{account}/charges", post(handler)));
    Router::new().nest("/v1/accounts", accounts).layer(from_fn(authenticate))
}

/// Lets requests pass whose user is restored. Nothing else can have set the extension.
async fn authenticate(mut request: Request, next: Next) -> Response {
    if request.extensions().get::<UserId>().is_none() {
        let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let user = token.and_then(|token| token.strip_prefix("Bearer ")?.strip_prefix(TOKEN));
        let Some(user) = user.map(str::to_owned) else { return StatusCode::UNAUTHORIZED.into_response() };
        request.extensions_mut().insert(Consumer::new(&user).unwrap());
        request.extensions_mut().insert(UserId(user));
    }
    next.run(request).await
}

fn pieces(body: &Bytes) -> impl Stream<Item = Result<Bytes, Infallible>> + use<> {
    let half = body.len() / 2;
    tokio_stream::iter([Ok(body.slice(..half)), Ok(body.slice(half..))])
}

/// A user's charge, with a body that arrives in pieces.
pub(crate) fn charge(user: &str, key: &str) -> Request {
    let mut request = Request::post("/v1/accounts/a%20b/charges?dry=no&n=1")
        .header("authorization", format!("Bearer {TOKEN}{user}"))
        .header("cookie", format!("session={TOKEN}{user}"))
        .header("proxy-authorization", format!("Basic {TOKEN}{user}"))
        .header("content-type", "text/plain; charset=utf-8")
        .header("accept-language", "de")
        .header("idempotency-key", key)
        .body(Body::from_stream(pieces(&"amount=2000".into())))
        .unwrap();
    let tenant = axum::http::HeaderValue::from_bytes(b"t\xfcv").unwrap();
    request.headers_mut().insert(TENANT, tenant);
    request
}

pub(crate) fn restore_user(consumer: &Consumer) -> Result<UserId, Refused> {
    Ok(UserId(consumer.as_str().to_owned()))
}

pub(crate) fn completer(
    app: Router,
    restore: impl Fn(&Consumer) -> Result<UserId, Refused> + Send + Sync + 'static,
) -> Completer {
    let pause = Duration::from_millis(10);
    Completer::new(app.into_service::<Body>(), RestoreWith(restore))
        .with_interval(pause)
        .with_backoff(pause, pause)
}

struct RestoreWith<F>(F);

#[async_trait::async_trait]
impl<F: Fn(&Consumer) -> Result<UserId, Refused> + Send + Sync + 'static> Restore for RestoreWith<F> {
    async fn restore(
        &self,
        request: &mut axum::http::Request<()>,
        consumer: &Consumer,
    ) -> Result<(), Refused> {
        let user = (self.0)(consumer)?;
        request.extensions_mut().insert(user);
        Ok(())
    }
}

pub(crate) async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !reached().await {
        assert!(Instant::now() < deadline, "waited 30 s in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn is_completed(record: Option<&Record>) -> bool {
    record.is_some_and(|record| matches!(record.state, RecordState::Completed { .. }))
}

/// What differs between the databases.
#[async_trait::async_trait]
pub(crate) trait Dialect: Db {
    /// How often a text is in the tables of the layer, in whatever column.
    async fn occurrences(pool: &Pool<Self>, text: &str) -> usize;

    /// A statement that gives all kept requests another version.
    const NEWER: &str;
}

#[async_trait::async_trait]
impl Dialect for Sqlite {
    const NEWER: &str = "UPDATE idempotency_requests SET request = CAST(x'09' || substr(request, 2) AS BLOB)";

    async fn occurrences(pool: &Pool<Self>, text: &str) -> usize {
        let columns = "SELECT t.name, c.name FROM sqlite_master AS t, pragma_table_info(t.name) AS c WHERE t.type = 'table'";
        let columns: Vec<(String, String)> = sqlx::query_as(columns).fetch_all(pool).await.unwrap();
        assert!(columns.len() > 40, "{columns:?}");
        let mut found = 0;
        for (table, column) in columns {
            let sql = format!(
                "SELECT count(*) FROM \"{table}\" WHERE instr(CAST(\"{column}\" AS BLOB), CAST(?1 AS BLOB)) > 0"
            );
            let count: i64 =
                sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(text).fetch_one(pool).await.unwrap();
            found += usize::try_from(count).unwrap();
        }
        found
    }
}

#[async_trait::async_trait]
impl Dialect for Postgres {
    const NEWER: &str = "UPDATE idempotency_requests SET request = set_byte(request, 0, 9)";

    async fn occurrences(pool: &Pool<Self>, text: &str) -> usize {
        let tables =
            "SELECT table_name::text FROM information_schema.tables WHERE table_schema = current_schema()";
        let tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(pool).await.unwrap();
        assert!(tables.len() >= 5, "{tables:?}");
        let mut found = 0;
        for table in tables {
            // Bytes are shown in hexadecimal.
            let sql = format!(
                "SELECT count(*) FROM \"{table}\" AS t WHERE t::text LIKE '%' || $1 || '%'
                    OR t::text LIKE '%' || encode(convert_to($1, 'UTF8'), 'hex') || '%'"
            );
            let count: i64 =
                sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(text).fetch_one(pool).await.unwrap();
            found += usize::try_from(count).unwrap();
        }
        found
    }
}

/// Runs tests on every store that keeps requests.
macro_rules! on_both_stores {
    ($($test:ident),* $(,)?) => {$(
        mod $test {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$test($crate::shop::Shop::<sqlx::Sqlite>::open().await).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            #[ignore = "needs PostgreSQL: run scripts/test"]
            async fn postgres() {
                super::$test($crate::shop::Shop::<sqlx::Postgres>::open().await).await;
            }
        }
    )*};
}
pub(crate) use on_both_stores;

pub(crate) const LEASE: Duration = Duration::from_secs(1);
pub(crate) const TENANT: header::HeaderName = header::HeaderName::from_static("x-tenant");
