//! Servers that die at named points of an attempt.

use std::{
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tokio::{task::block_in_place, time::sleep};

use crate::{
    Run,
    books::{Books, Ledger, Poller},
    client::{Client, Order},
    lanes::{self, Todo},
    report::Check,
    role::KILL_AT,
    server,
    support::{
        proxy::{Fault, Proxy},
        schema::{self, Schema},
        server::Server,
        sqlite::SqliteFile,
    },
    trap::Point,
};

pub async fn run(run: &Run) {
    let schema = Schema::create().await;
    kill_all(run, "PostgreSQL", &schema.url()).await;
    let file = SqliteFile::new();
    kill_all(run, "SQLite", &format!("{}?mode=rwc", file.url())).await;
}

/// What the lanes of one database share.
struct Site {
    database: &'static str,
    url: String,
    books: Books,
    client: Client,
    /// A server that nobody kills.
    survivor: SocketAddr,
    ledger: Ledger,
    todo: Todo<Point>,
    /// For each point, that processes have died there and not elsewhere.
    checks: Vec<(Point, Check)>,
}

async fn kill_all(run: &Run, database: &'static str, url: &str) {
    let books = Books::open(url).await;
    let survivor = block_in_place(|| Server::start_program(server(), Some(url), &[]));
    let polls = Check::new(format!("kills, {database}: charges and records agree in every snapshot"));
    let poller = Poller::start(&books, &polls);
    let of = |point: Point| {
        Check::new(format!("kills, {database}: killed at '{}', the key is intact", point.name()))
    };
    let site = Arc::new(Site {
        database,
        url: url.to_owned(),
        books: books.clone(),
        client: Client::new(PATIENCE),
        survivor: survivor.address(),
        ledger: Ledger::default(),
        todo: Todo::new(POINTS, run.count(50)),
        checks: POINTS.map(|point| (point, of(point))).into(),
    });
    lanes::run(LANES, || lane(Arc::clone(&site))).await;
    poller.stop().await;
    let audit = site.ledger.audit(&books).await;
    for (point, check) in &site.checks {
        audit.check(point.name(), check);
        check.print();
    }
    polls.print();
    println!("kills, {database}: clients were told {}", site.client.refusals());
}

/// Kills one server after the other.
async fn lane(site: Arc<Site>) {
    let mut victim: Option<Victim> = None;
    while let Some((point, number)) = site.todo.take() {
        let victim = victim.get_or_insert_with(|| Victim::start(&site.url));
        let key = format!("{}-{number}", point.name());
        victim.warm(&site, &key).await;
        victim.kill(&site, &key, point).await;
        // The client tries elsewhere or waits for the server to come back.
        if number % 2 == 0 {
            block_in_place(|| victim.server.start_again());
        }
        let addresses =
            if number % 2 == 0 { [victim.server.address(), site.survivor] } else { [site.survivor; 2] };
        let until = Instant::now() + PATIENCE;
        for addresses in [&addresses[..1], &addresses[..], &addresses[1..]] {
            let reply = site.client.insist(addresses, Order::new(&key), until).await;
            site.ledger.note(&key, reply);
        }
        if number % 2 == 1 {
            block_in_place(|| victim.server.start_again());
        }
    }
}

/// A server to kill, and its network if its database has one.
struct Victim {
    server: Server,
    proxy: Option<Proxy>,
}

impl Victim {
    fn start(url: &str) -> Self {
        let (proxy, url) = if url.starts_with("sqlite:") {
            (None, url.to_owned())
        } else {
            let (proxy, url) = schema::through_proxy(url);
            (Some(proxy), url)
        };
        let server = block_in_place(|| Server::start_program(server(), Some(&url), &[]));
        Self { server, proxy }
    }

    /// Opens the server's connections, of which the first prepares the store.
    async fn warm(&self, site: &Site, key: &str) {
        let order = Order::new(format!("warm-{key}"));
        let reply = site.client.insist(&[self.server.address()], order, Instant::now() + PATIENCE).await;
        if let Err(error) = reply {
            panic!("{}: the server is not fit to be killed for {key}: {error}", site.database);
        }
    }

    async fn kill(&mut self, site: &Site, key: &str, point: Point) {
        let (_, check) =
            site.checks.iter().find(|(checked, _)| *checked == point).expect("every point is checked");
        let order = Order::new(key).with(KILL_AT, point.name());
        let cut = self.proxy.as_ref().filter(|_| point == Point::Completed);
        if let Some(proxy) = cut {
            proxy.set(Fault::HoldRequestsFrom(b"COMMIT"));
        }
        let (client, address) = (site.client.clone(), self.server.address());
        // A request that was refused has not got as far as the point.
        let request = tokio::spawn(async move {
            loop {
                match client.send(address, &order).await {
                    Ok(reply) if reply.answer.status == 503 => sleep(Duration::from_millis(20)).await,
                    answered => return answered,
                }
            }
        });
        if let Some(proxy) = cut {
            proxy.until(|counts| counts.withheld > 0).await;
            block_in_place(|| self.server.kill9());
            proxy.cut();
            proxy.set(Fault::None);
        } else {
            let status = block_in_place(|| self.server.wait());
            if status.signal() != Some(Signal::KILL.as_raw()) {
                check.fail(key, format!("the server ended with {status}"));
            }
        }
        if let Ok(reply) = request.await.expect("a client does not fail") {
            check.fail(key, format!("an answer before the kill: {reply:?}"));
        }
        let charged = site.books.entry(key).await.is_some();
        if charged != (point == Point::Committed) {
            check.fail(key, format!("charged before the kill: {charged}"));
        }
    }
}

const LANES: usize = 8;
const PATIENCE: Duration = Duration::from_secs(30);
const POINTS: [Point; 6] =
    [Point::Claimed, Point::Begun, Point::Written, Point::Returned, Point::Completed, Point::Committed];
