//! Servers that die around the call of an upstream service, and calls whose answer is lost.
//!
//! The upstream is in this process: it survives the servers, and knows how often it was called and what it has made.

mod case;

use std::{
    fmt,
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tokio::{task::block_in_place, time::sleep};
use tower_idempotency::{IdempotencyHandle, IdempotencyLayer, Intent, Lookup, Reconciler, Resource};

use self::case::Case;
use crate::{
    Run,
    books::{Books, Ledger},
    client::{Client, Order, Reply},
    lanes::{self, Todo},
    payout::{DEDUPLICATES, FAIL_AFTER_CALL, UPSTREAM},
    report::Check,
    role::KILL_AT,
    server,
    support::{
        schema::Schema,
        server::{Program, Server},
        sqlite::SqliteFile,
        upstream::Upstream,
    },
};

pub async fn run(run: &Run) {
    for deduplicates in [true, false] {
        let schema = Schema::create().await;
        work_through(run, "PostgreSQL", &schema.url(), deduplicates).await;
        let file = SqliteFile::new();
        work_through(run, "SQLite", &format!("{}?mode=rwc", file.url()), deduplicates).await;
    }
}

/// How many of so many payouts were made twice by servers of this program, whose answers were lost.
pub async fn doubles(program: Program, times: usize) -> (usize, usize) {
    let schema = Schema::create().await;
    let site = Site::open(program, &schema.url(), false, Todo::new(Case::LOST_ANSWERS, times)).await;
    lanes::run(LANES, || lane(Arc::clone(&site))).await;
    site.handle.drain(PATIENCE).await.expect("the reconciler ends");
    let keys = Case::LOST_ANSWERS.into_iter().flat_map(|case| (0..times).map(move |number| case.key(number)));
    let keys: Vec<_> = keys.collect();
    (keys.iter().filter(|key| site.upstream.transfers_for(key).len() > 1).count(), keys.len())
}

/// What the lanes of one database share.
struct Site {
    program: Program,
    url: String,
    books: Books,
    upstream: Upstream,
    client: Client,
    /// A server that nobody kills.
    survivor: Server,
    /// Of the reconciler in this process.
    handle: IdempotencyHandle,
    ledger: Ledger,
    todo: Todo<Case>,
    /// None if faults are expected.
    checks: Option<Checks>,
}

struct Checks {
    cases: Vec<(Case, Check)>,
    /// That nothing is called while the outcome is unknown.
    held: Check,
}

async fn work_through(run: &Run, database: &str, url: &str, deduplicates: bool) {
    let times = run.count(50);
    let mut site = Site::open(server(), url, deduplicates, Todo::new(Case::ALL, times)).await;
    let which = if deduplicates { "deduplicating" } else { "not deduplicating" };
    let of = |what: String| Check::new(format!("upstream, {which}, {database}: {what}"));
    let made = Case::ALL.map(|case| (case, of(format!("{}, one transfer, payout and answer", case.what()))));
    let held = of("called again only once it is known that there is no transfer".to_owned());
    let checks = Checks { cases: made.into(), held };
    Arc::get_mut(&mut site).expect("no lane runs yet").checks = Some(checks);
    lanes::run(LANES, || lane(Arc::clone(&site))).await;
    site.handle.drain(PATIENCE).await.expect("the reconciler ends");
    let audit = site.ledger.audit(&site.books).await;
    let Some(checks) = &site.checks else { return };
    for (case, check) in &checks.cases {
        audit.check(&case.to_string(), check);
        check.print();
    }
    if !deduplicates {
        checks.held.print();
    }
    println!("upstream, {which}, {database}: clients were told {}", site.client.refusals());
}

/// One case after the other happens to a server.
async fn lane(site: Arc<Site>) {
    let mut victim: Option<Server> = None;
    while let Some((case, number)) = site.todo.take() {
        let victim = victim.get_or_insert_with(|| block_in_place(|| site.start_server()));
        let key = case.key(number);
        let warm = Order::payout(format!("warm-{key}"));
        let warmed = site.client.insist(&[victim.address()], warm, Instant::now() + PATIENCE).await;
        warmed.unwrap_or_else(|error| panic!("the server is not fit for {key}: {error}"));
        let killed = site.happen(case, &key, victim).await;
        // The client tries elsewhere or waits for the server to come back.
        let elsewhere = number.is_multiple_of(2);
        if killed && !elsewhere {
            block_in_place(|| victim.start_again());
        }
        let address = if elsewhere { site.survivor.address() } else { victim.address() };
        if let Err(fault) = site.make_up(case, &key, address).await {
            site.fail(case, &key, fault);
        }
        if killed && elsewhere {
            block_in_place(|| victim.start_again());
        }
    }
}

impl Site {
    async fn open(program: Program, url: &str, deduplicates: bool, todo: Todo<Case>) -> Arc<Self> {
        let (books, upstream) = (Books::open(url).await, Upstream::start(deduplicates).await);
        let handle = IdempotencyLayer::new(books.store()).handle();
        handle.start_reconciler(reconciler(&upstream)).expect("the store keeps intents");
        let survivor = block_in_place(|| start_server(&program, url, &upstream));
        Arc::new(Self {
            program,
            url: url.to_owned(),
            books,
            upstream,
            client: Client::new(PATIENCE),
            survivor,
            handle,
            ledger: Ledger::default(),
            todo,
            checks: None,
        })
    }

    fn start_server(&self) -> Server {
        start_server(&self.program, &self.url, &self.upstream)
    }

    fn fail(&self, case: Case, key: &str, fault: impl fmt::Display) {
        let cases = self.checks.iter().flat_map(|checks| &checks.cases);
        if let Some((_, check)) = cases.into_iter().find(|(checked, _)| *checked == case) {
            check.fail(key, fault);
        }
    }

    /// Sends the request to which the case happens. Returns whether the server was killed.
    async fn happen(self: &Arc<Self>, case: Case, key: &str, server: &mut Server) -> bool {
        let order = match case {
            Case::Killed(point) => Order::payout(key).with(KILL_AT, point.name()),
            Case::HandlerFails => Order::payout(key).with(FAIL_AFTER_CALL, "yes"),
            Case::KilledWhileCalled | Case::KilledWhileMade | Case::ServerError | Case::Reset => {
                Order::payout(key)
            }
        };
        if let Some(act) = case.act() {
            self.upstream.then_for(key, act);
        }
        let request = tokio::spawn(Arc::clone(self).send_until_it_happens(case, order, server.address()));
        let killed = match case {
            Case::Killed(_) => {
                let status = block_in_place(|| server.wait());
                if status.signal() != Some(Signal::KILL.as_raw()) {
                    self.fail(case, key, format!("the server ended with {status}"));
                }
                true
            }
            Case::KilledWhileCalled | Case::KilledWhileMade => {
                self.upstream.until_called_for(key, 1).await;
                block_in_place(|| server.kill9());
                true
            }
            Case::ServerError | Case::Reset | Case::HandlerFails => false,
        };
        let answered = request.await.expect("a client does not fail");
        if killed == answered.is_ok() || answered.as_ref().is_ok_and(|reply| reply.answer.status == 201) {
            self.fail(case, key, format!("answered {answered:?}"));
        }
        killed
    }

    /// A busy database may refuse a request before it has got as far as the case: then it is sent again.
    async fn send_until_it_happens(
        self: Arc<Self>,
        case: Case,
        order: Order,
        address: SocketAddr,
    ) -> Result<Reply, String> {
        loop {
            let answered = self.client.send(address, &order).await;
            let Ok(Reply { answer, .. }) = &answered else { return answered };
            let happened = !matches!(case, Case::Killed(_)) && self.upstream.calls_for(&order.key) > 0;
            if happened || answer.status == 201 {
                return answered;
            }
            if answer.is_refused("outcome-unknown") {
                self.books.let_dangle(&order.key).await;
            }
            sleep(PAUSE).await;
        }
    }

    /// Repeats the request until it succeeds, and checks what the upstream was asked for until then. An error says what is
    /// wrong with it.
    async fn make_up(&self, case: Case, key: &str, address: SocketAddr) -> Result<(), String> {
        self.compare(key, case.calls(), case.is_made())?;
        let mut calls = case.calls().max(1);
        let mut order = Order::payout(key);
        if case.is_unknown() && !self.upstream.deduplicates() {
            let refused = self.until_refused(key, address).await;
            let refused = refused.and_then(|()| self.compare(key, case.calls(), case.is_made()));
            if let Some(Checks { held, .. }) = &self.checks {
                held.that(refused.is_ok(), key, refused.as_ref().err().map_or("", String::as_str));
            }
            refused?;
            self.books.let_dangle(key).await;
            order = order.that_may_be_unknown();
            calls = case.calls() + usize::from(!case.is_made());
        } else if case.is_unknown() {
            calls = case.calls() + 1;
        } else if case.is_made() {
            // A busy database may not have recorded it in time: then the handler has gone on, and it is looked up.
            self.books.let_dangle(key).await;
            order = order.that_may_be_unknown();
        }
        for _ in 0..2 {
            let until = Instant::now() + PATIENCE;
            let reply = self.client.insist(&[address, self.survivor.address()], order.clone(), until).await;
            self.ledger.note(key, reply.clone());
            let (made, body) = (self.upstream.transfers_for(key), reply?.answer.body);
            if !made.iter().any(|made| body == format!("charge {}", made.id)) {
                return Err(format!("{body:?} is none of {made:?}"));
            }
        }
        self.compare(key, calls, true)
    }

    /// Sends until the outcome is unknown for good, and then some more.
    async fn until_refused(&self, key: &str, address: SocketAddr) -> Result<(), String> {
        let (mut refused, until) = (0, Instant::now() + PATIENCE);
        while refused < 3 {
            match self.client.send(address, &Order::payout(key)).await {
                Ok(reply) if reply.answer.is_refused("outcome-unknown") && reply.answer.status == 409 => {
                    refused += 1
                }
                Ok(reply) if refused == 0 && reply.answer.is_refused("in-progress") => {}
                Ok(reply) if reply.answer.status == 503 => {}
                answered => return Err(format!("before anybody has looked it up: {answered:?}")),
            }
            if Instant::now() > until {
                return Err("the outcome is not unknown in time".to_owned());
            }
            sleep(PAUSE).await;
        }
        Ok(())
    }

    /// What the upstream was asked for and has made.
    fn compare(&self, key: &str, calls: usize, is_made: bool) -> Result<(), String> {
        let mut asked = self.upstream.requests();
        asked.retain(|asked| asked.reference == key);
        let made = self.upstream.transfers_for(key);
        let one_key = asked.iter().all(|other| other.key == asked[0].key);
        if (asked.len(), made.len()) != (calls, usize::from(is_made)) || !one_key {
            return Err(format!("{made:?} after {asked:?}, {calls} calls were expected"));
        }
        Ok(())
    }
}

fn start_server(program: &Program, url: &str, upstream: &Upstream) -> Server {
    let address = upstream.address().to_string();
    let mut variables = vec![(UPSTREAM, address.as_str())];
    if upstream.deduplicates() {
        variables.push((DEDUPLICATES, "yes"));
    }
    Server::start_program(program.clone(), Some(url), &variables)
}

/// Looks soon, and again soon.
pub fn reconciler(upstream: &Upstream) -> Reconciler {
    let client = upstream.client();
    let look_up = move |intent: Intent| {
        let client = client.clone();
        async move {
            let found = client.look_up(intent.upstream_key).await?;
            Ok(found.map_or(Lookup::NotFound, |id| Lookup::Found(Resource::new(id))))
        }
    };
    let soon = Duration::from_millis(50);
    Reconciler::new()
        .on("bank.transfer", look_up)
        .with_interval(soon)
        .with_confirmation_after(soon)
        .with_backoff(soon, soon)
}

const LANES: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(30);
