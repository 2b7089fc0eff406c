//! Processes that are frozen while they hold locks, and handlers that outlive their lease: others get through.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    task::{JoinSet, block_in_place},
    time::sleep,
};

use crate::{
    Run,
    books::{Books, Ledger},
    client::{Client, Order, Reply},
    report::Check,
    role::{FREEZE_AT, SLEEP_BEFORE_MS, SLEEP_INSIDE_MS, TOUCH_SHARED_ROW},
    server,
    support::{
        proxy::Fault,
        schema::{self, Schema},
        server::Server,
        sqlite::SqliteFile,
    },
    trap::Point,
};

pub async fn run(run: &Run) {
    with_row_locks(run).await;
    before_commit(run).await;
    with_the_write_lock(run).await;
    for isolation in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        slow_handlers(run, isolation).await;
    }
}

/// Two servers, of which the first is to be frozen.
struct Pair {
    victim: Server,
    other: Server,
    books: Books,
    ledger: Arc<Ledger>,
    client: Client,
}

impl Pair {
    async fn start(url: &str, url_of_victim: &str, variables: &[(&str, &str)]) -> Self {
        let books = Books::open(url).await;
        let start = |url| block_in_place(|| Server::start_program(server(), Some(url), variables));
        let (victim, other) = (start(url_of_victim), start(url));
        let client = Client::new(PATIENCE);
        let pair = Self { victim, other, books, ledger: Arc::default(), client };
        for address in [pair.victim.address(), pair.other.address()] {
            // At once, so that there are connections for all that comes.
            let orders = (0..8).map(|number| Order::new(format!("warm-{address}-{number}")));
            orders.map(|order| pair.request(address, order)).collect::<JoinSet<_>>().join_all().await;
        }
        pair
    }

    /// Insists on an answer, and notes it.
    fn request(&self, address: SocketAddr, order: Order) -> impl Future<Output = ()> + Send + use<> {
        let (client, ledger) = (self.client.clone(), Arc::clone(&self.ledger));
        async move {
            let reply = client.insist(&[address], order.clone(), Instant::now() + PATIENCE).await;
            ledger.note(&order.key, reply);
        }
    }

    /// Sends a request once to the server that is not frozen, and tells how long the answer took.
    async fn ask(&self, key: &str) -> (Result<Reply, String>, Duration) {
        let asked = Instant::now();
        (self.client.send(self.other.address(), &Order::new(key)).await, asked.elapsed())
    }

    async fn until_frozen(&self) {
        while !self.victim.is_stopped() {
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn audit(&self, what: &str) {
        let check = Check::new(format!("{what}: one effect and one answer for each key"));
        self.ledger.audit(&self.books).await.check("", &check);
        check.print();
        println!("{what}: clients were told {}", self.client.refusals());
    }
}

/// The server of the database ends the transaction, after the lease by default.
async fn with_row_locks(run: &Run) {
    let what = "freezes: an owner with row locks";
    let check = Check::new(format!("{what}: others are through within the lease and 2 s"));
    let schema = Schema::create().await;
    let pair = Pair::start(&schema.url(), &schema.url(), &[]).await;
    let slowest = Mutex::new(Duration::ZERO);
    for round in 0..run.count(20) {
        let key = format!("row-{round}");
        let order = Order::new(&key).with(TOUCH_SHARED_ROW, 1).with(FREEZE_AT, Point::Written.name());
        let owner = tokio::spawn(pair.request(pair.victim.address(), order));
        pair.until_frozen().await;
        let through = |key: String| {
            let (check, pair, slowest) = (&check, &pair, &slowest);
            async move {
                let frozen = Instant::now();
                pair.request(pair.other.address(), Order::new(&key).with(TOUCH_SHARED_ROW, 1)).await;
                let took = frozen.elapsed();
                check.that(took < LEASE + Duration::from_secs(2), &key, format!("{took:?}"));
                let mut slowest = slowest.lock().unwrap();
                *slowest = took.max(*slowest);
            }
        };
        tokio::join!(through(key), through(format!("other-{round}")));
        pair.victim.cont();
        owner.await.expect("a client does not fail");
    }
    check.print();
    println!("{what}: the slowest took {:?}", slowest.lock().unwrap());
    pair.audit(what).await;
}

/// The network keeps its COMMIT, so that its record is completed and not committed.
async fn before_commit(run: &Run) {
    let what = "freezes: an owner before its COMMIT";
    let check = Check::new(format!("{what}: duplicates get 409, other keys are answered, in 200 ms"));
    let schema = Schema::create().await;
    let (proxy, url) = schema::through_proxy(&schema.url());
    let pair = Pair::start(&schema.url(), &url, &[("IDLE_TIMEOUT_MS", "20000")]).await;
    let mut slowest = Duration::ZERO;
    for round in 0..run.count(10) {
        let key = format!("commit-{round}");
        proxy.set(Fault::HoldRequestsFrom(b"COMMIT"));
        let owner = tokio::spawn(pair.request(pair.victim.address(), Order::new(&key)));
        proxy.until(|counts| counts.withheld > 0).await;
        pair.victim.stop();
        for number in 0..100 {
            if number == 50 {
                // The record is still locked when its lease has run out.
                sleep(LEASE).await;
            }
            let other = format!("commit-{round}-{number}");
            let (duplicate, other) = tokio::join!(timed(&pair, &key, 409), timed(&pair, &other, 201));
            for (answer, took) in [duplicate, other] {
                check.that(answer.is_ok() && took < QUICK, &key, format!("{took:?}: {answer:?}"));
                slowest = slowest.max(took);
            }
        }
        proxy.set(Fault::None);
        pair.victim.cont();
        owner.await.expect("a client does not fail");
    }
    check.print();
    println!("{what}: the slowest answer took {slowest:?}");
    pair.audit(what).await;
}

/// Asks once, for an answer with this status.
async fn timed(pair: &Pair, key: &str, status: u16) -> (Result<(), String>, Duration) {
    let (reply, took) = pair.ask(key).await;
    let found = match &reply {
        Ok(reply) if reply.answer.status == status => Ok(()),
        reply => Err(format!("{reply:?}")),
    };
    if status == 201 {
        pair.ledger.note(key, reply);
    }
    (found, took)
}

/// Nobody else can write to a SQLite file meanwhile.
async fn with_the_write_lock(run: &Run) {
    let what = "freezes: an owner with SQLite's write lock";
    let check = Check::new(format!("{what}: duplicates get 409, others 503 within the store time-out"));
    let file = SqliteFile::new();
    let url = format!("{}?mode=rwc", file.url());
    let pair = Pair::start(&url, &url, &[("LEASE_MS", "20000")]).await;
    for round in 0..run.count(10) {
        let key = format!("lock-{round}");
        let order = Order::new(&key).with(FREEZE_AT, Point::Written.name());
        let owner = tokio::spawn(pair.request(pair.victim.address(), order));
        pair.until_frozen().await;
        let others: Vec<_> = (0..4).map(|number| format!("lock-{round}-{number}")).collect();
        let [first, second, third, fourth] = &others[..] else { unreachable!() };
        let refused =
            async { tokio::join!(pair.ask(first), pair.ask(second), pair.ask(third), pair.ask(fourth)) };
        let ((a, b, c, d), duplicate) = tokio::join!(refused, pair.ask(&key));
        for (other, (reply, took)) in others.iter().zip([a, b, c, d]) {
            let unavailable = reply.as_ref().is_ok_and(|reply| reply.answer.is_refused("store-unavailable"));
            let in_time = took < STORE_TIMEOUT + QUICK;
            check.that(unavailable && in_time, other, format!("{took:?}: {reply:?}"));
        }
        let (reply, took) = duplicate;
        let in_progress = reply.as_ref().is_ok_and(|reply| reply.answer.is_refused("in-progress"));
        check.that(in_progress && took < QUICK, &key, format!("{took:?}: {reply:?}"));
        pair.victim.cont();
        owner.await.expect("a client does not fail");
        for other in others {
            pair.request(pair.other.address(), Order::new(other)).await;
        }
    }
    check.print();
    pair.audit(what).await;
}

/// The record is locked while the transaction is open, and renewed before.
async fn slow_handlers(run: &Run, isolation: &str) {
    let schema = Schema::create().await;
    let variables = [("ISOLATION", isolation), ("IDLE_TIMEOUT_MS", "10000")];
    let pair = Pair::start(&schema.url(), &schema.url(), &variables).await;
    let client = Client::new(IMPATIENCE);
    let mut clients = JoinSet::new();
    for (number, duplicate) in (0..run.count(20)).flat_map(|number| [(number, 0), (number, 1), (number, 2)]) {
        let before = if number % 2 == 0 { 0 } else { 1500 };
        let order = Order::new(format!("slow-{number}"));
        let order = order.with(SLEEP_BEFORE_MS, before).with(SLEEP_INSIDE_MS, 3000 - before);
        let mut addresses = [pair.victim.address(), pair.other.address()];
        addresses.rotate_left(duplicate % 2);
        let (client, ledger) = (client.clone(), Arc::clone(&pair.ledger));
        clients.spawn(async move {
            let key = order.key.clone();
            ledger.note(&key, client.insist(&addresses, order, Instant::now() + PATIENCE).await);
        });
    }
    clients.join_all().await;
    println!("slow handlers: clients were told {}", client.refusals());
    pair.audit(&format!("handlers of 3 s at a lease of 1 s, {isolation}")).await;
}

const LEASE: Duration = Duration::from_secs(1);
const STORE_TIMEOUT: Duration = Duration::from_secs(2);
const QUICK: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(30);
const IMPATIENCE: Duration = Duration::from_millis(700);
