//! Servers that die at every boundary of a request in three phases, whose client comes back or does not.

use std::{
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tokio::{task::block_in_place, time::sleep};
use tower_idempotency::{Consumer, IdempotencyHandle, IdempotencyKey, IdempotencyLayer, store::RecordState};

use crate::{
    Run,
    books::Books,
    client::{Client, Order, Reply},
    journal::{JOURNAL, Journal},
    lanes::{self, Todo},
    payout::{DEDUPLICATES, UPSTREAM},
    phased::failed,
    report::Check,
    role::{ABANDONED_AFTER_MS, COMPLETES, KILL_AT},
    server,
    support::{schema::Schema, server::Server, sqlite::SqliteFile, upstream::Upstream},
    trap::Point,
    upstream::reconciler,
};

pub async fn run(run: &Run) {
    for deduplicates in [true, false] {
        let schema = Schema::create().await;
        work_through(run, "PostgreSQL", &schema.url(), deduplicates).await;
        let file = SqliteFile::new();
        work_through(run, "SQLite", &format!("{}?mode=rwc", file.url()), deduplicates).await;
    }
}

/// Who sees to it that a request is completed whose server was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Its client, when the server is back.
    Back,
    /// Its client, at another server.
    Elsewhere,
    /// The completer of another server: the client does not come back before that.
    Completer,
}

/// What the lanes of one database share.
struct Site {
    url: String,
    books: Books,
    upstream: Upstream,
    journal: Journal,
    client: Client,
    /// A server that nobody kills, and that completes abandoned requests.
    survivor: Server,
    /// Of the reconciler in this process.
    handle: IdempotencyHandle,
    todo: Todo<Point>,
    checks: Vec<(Point, Check)>,
    /// That requests are completed without their clients.
    completed: Check,
}

async fn work_through(run: &Run, database: &str, url: &str, deduplicates: bool) {
    let points = if deduplicates { &POINTS[..] } else { &AROUND_CALL[..] };
    let which = if deduplicates { "deduplicating" } else { "not deduplicating" };
    let of = |what: String| Check::new(format!("phases, {which}, {database}: {what}"));
    let killed = |point: &Point| of(format!("killed at '{}', each step done once, one answer", point.name()));
    let site = Site::open(
        url,
        Upstream::start(deduplicates).await,
        Todo::new(points.iter().copied(), run.count(20)),
        points.iter().map(|point| (*point, killed(point))).collect(),
        of("completed without its client, which gets a replay".to_owned()),
    );
    let site = Arc::new(site.await);
    lanes::run(LANES, || lane(Arc::clone(&site))).await;
    site.handle.drain(PATIENCE).await.expect("the reconciler ends");
    let in_need = site.handle.list_requests(10).await.expect("the database answers");
    in_need.iter().for_each(|request| site.completed.fail(request.key.as_str(), format!("{request:?}")));
    site.checks.iter().for_each(|(_, check)| check.print());
    site.completed.print();
    println!("phases, {which}, {database}: clients were told {}", site.client.refusals());
}

/// Kills one server after the other.
async fn lane(site: Arc<Site>) {
    let mut victim: Option<Server> = None;
    while let Some((point, number)) = site.todo.take() {
        let victim = victim.get_or_insert_with(|| {
            block_in_place(|| start_server(&site.url, &site.upstream, &site.journal, false))
        });
        let key = format!("{}-{number}", point.name());
        let warm = Order::phased(format!("warm-{key}"));
        let warmed = site.client.insist(&[victim.address()], warm, Instant::now() + PATIENCE).await;
        warmed.unwrap_or_else(|error| panic!("the server is not fit to be killed for {key}: {error}"));
        let killed = site.kill(point, &key, victim).await;
        let way = Way::of(point, number);
        if way == Way::Back {
            block_in_place(|| victim.start_again());
        }
        let address = if way == Way::Back { victim.address() } else { site.survivor.address() };
        let answered = site.make_up(point, &key, way, address).await;
        if way != Way::Back {
            block_in_place(|| victim.start_again());
        }
        let done = match answered {
            Ok(reply) => site.verify(point, &key, &reply, victim.address()).await,
            Err(error) => Err(error),
        };
        let (_, check) =
            site.checks.iter().find(|(checked, _)| *checked == point).expect("every point is checked");
        let fault = killed.and(done).err();
        check.that(fault.is_none(), &format!("{key} ({way:?})"), fault.unwrap_or_default());
    }
}

impl Way {
    fn of(point: Point, number: usize) -> Self {
        match number % 4 {
            // A request whose server dies before it is kept is known to its client only.
            1 | 3 if point != Point::Claimed => Self::Completer,
            0 | 1 => Self::Back,
            _ => Self::Elsewhere,
        }
    }
}

impl Site {
    async fn open(
        url: &str,
        upstream: Upstream,
        todo: Todo<Point>,
        checks: Vec<(Point, Check)>,
        completed: Check,
    ) -> Self {
        let (books, journal) = (Books::open(url).await, Journal::start().await);
        let handle = IdempotencyLayer::new(books.store()).handle();
        handle.start_reconciler(reconciler(&upstream)).expect("the store keeps intents");
        let survivor = block_in_place(|| start_server(url, &upstream, &journal, true));
        let (client, url) = (Client::new(PATIENCE), url.to_owned());
        Self { url, books, upstream, journal, client, survivor, handle, todo, checks, completed }
    }

    /// Sends the request whose server dies at the point. An error says what should not be as it is then.
    async fn kill(self: &Arc<Self>, point: Point, key: &str, server: &mut Server) -> Result<(), String> {
        let order = Order::phased(key).with(KILL_AT, point.name());
        let request = tokio::spawn(Arc::clone(self).send_until_killed(order, server.address()));
        let status = block_in_place(|| server.wait());
        let answered = request.await.expect("a client does not fail");
        if status.signal() != Some(Signal::KILL.as_raw()) || answered.is_ok() {
            return Err(format!("the server ended with {status}, the client was told {answered:?}"));
        }
        let found = (
            self.books.lines(RESERVATIONS, key).await.len(),
            self.upstream.calls_for(key),
            self.books.lines(PAYOUTS, key).await.len(),
        );
        let reached = |step| usize::from(point >= step);
        let expected = (reached(Point::Reserved), reached(Point::Answered), reached(Point::Paid));
        if found != expected {
            return Err(format!(
                "reservations, calls and payouts when it was killed: {found:?}, not {expected:?}"
            ));
        }
        Ok(())
    }

    /// A busy database may refuse a request before it has got as far as the point: then it is sent again.
    async fn send_until_killed(self: Arc<Self>, order: Order, address: SocketAddr) -> Result<Reply, String> {
        loop {
            let reply = self.client.send(address, &order).await?;
            if reply.answer.is_refused("outcome-unknown") {
                self.books.let_dangle(&order.key).await;
            } else if reply.answer.status != 503 && !reply.answer.is_refused("in-progress") {
                return Ok(reply);
            }
            sleep(PAUSE).await;
        }
    }

    /// Sees to it that the request is completed. Returns what its client is told.
    async fn make_up(&self, point: Point, key: &str, way: Way, address: SocketAddr) -> Result<Reply, String> {
        let mut order = Order::phased(key);
        let called = matches!(point, Point::Opened | Point::Answered | Point::Finalized);
        if called && !self.upstream.deduplicates() {
            if point != Point::Finalized {
                self.until_held(point, key).await?;
            }
            // A busy database may not have recorded the answer in time: then it is looked up too.
            self.books.let_dangle(key).await;
            order = order.that_may_be_unknown();
        }
        if way == Way::Completer {
            let completed = self.until(key, |state| matches!(state, RecordState::Completed { .. })).await;
            // Otherwise it was completed before its server was killed.
            if point != Point::Committed {
                let fault = completed.as_ref().err().map_or("", String::as_str);
                self.completed.that(completed.is_ok(), key, fault);
            }
            completed?;
            order = Order::phased(key);
        }
        let addresses = [address, self.survivor.address()];
        let reply = self.client.insist(&addresses, order, Instant::now() + PATIENCE).await?;
        if way == Way::Completer && !reply.answer.replayed {
            return Err(format!("it was completed, and is performed again: {}", reply.shown));
        }
        Ok(reply)
    }

    /// Waits until the outcome of the call is unknown for good, and checks that it is not made again.
    async fn until_held(&self, point: Point, key: &str) -> Result<(), String> {
        self.until(key, |state| matches!(state, RecordState::Held)).await?;
        let reply = self.client.send(self.survivor.address(), &Order::phased(key)).await?;
        let calls = self.upstream.calls_for(key);
        if !reply.answer.is_refused("outcome-unknown") || calls != usize::from(point == Point::Answered) {
            return Err(format!("{calls} calls before anybody has looked it up, and {}", reply.shown));
        }
        Ok(())
    }

    async fn until(&self, key: &str, reached: impl Fn(&RecordState) -> bool) -> Result<(), String> {
        let consumer = Consumer::anonymous();
        let (name, until) = (IdempotencyKey::new(key).expect("a key"), Instant::now() + PATIENCE);
        loop {
            let record = self.handle.get(&consumer, &name).await.map_err(|error| error.to_string())?;
            if record.as_ref().is_some_and(|record| reached(&record.state)) {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("the record stays {record:?}"));
            }
            sleep(PAUSE).await;
        }
    }

    /// What was done for the key, and how often.
    async fn verify(&self, point: Point, key: &str, first: &Reply, again: SocketAddr) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        let replay = self.client.insist(&[again, self.survivor.address()], Order::phased(key), until).await?;
        if !replay.answer.replayed || replay.shown != first.shown {
            return Err(format!("two answers: {} and {}", first.shown, replay.shown));
        }
        let reservations = self.books.lines(RESERVATIONS, key).await;
        let payouts = self.books.lines(PAYOUTS, key).await;
        let transfers = self.upstream.transfers_for(key);
        let ([reservation], [payout], [transfer]) = (&reservations[..], &payouts[..], &transfers[..]) else {
            return Err(format!("{reservations:?}, {transfers:?}, {payouts:?}"));
        };
        let names = format!(" {reservation} {}", transfer.id);
        if !payout.ends_with(&names) || first.answer.body != *payout {
            return Err(format!("{payout:?} does not name{names}, or is not the answer {}", first.shown));
        }
        self.verify_steps(point, key)
    }

    /// Only what was under way when the server was killed was done again.
    fn verify_steps(&self, point: Point, key: &str) -> Result<(), String> {
        for (step, written) in [("reserve", Point::Reserving), ("pay", Point::Paying)] {
            let (done, undone) = (self.journal.count(key, step), self.journal.count(key, &failed(step)));
            if done != 1 + undone + usize::from(point == written) {
                return Err(format!("the step '{step}' was done {done} times, of which {undone} failed"));
            }
        }
        let mut asked = self.upstream.requests();
        asked.retain(|asked| asked.reference == key);
        let again = point == Point::Answered && self.upstream.deduplicates();
        if asked.len() != 1 + usize::from(again) || asked.iter().any(|other| other.key != asked[0].key) {
            return Err(format!("the upstream was asked for {asked:?}"));
        }
        Ok(())
    }
}

fn start_server(url: &str, upstream: &Upstream, journal: &Journal, completes: bool) -> Server {
    let (address, journal) = (upstream.address().to_string(), journal.address().to_string());
    let mut variables = vec![(UPSTREAM, &*address), (JOURNAL, &*journal), (ABANDONED_AFTER_MS, "1000")];
    if completes {
        variables.push((COMPLETES, "yes"));
    }
    if upstream.deduplicates() {
        variables.push((DEDUPLICATES, "yes"));
    }
    Server::start_program(server(), Some(url), &variables)
}

const LANES: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(30);
const POINTS: [Point; 12] = [
    Point::Claimed,
    Point::Entered,
    Point::Reserving,
    Point::Reserved,
    Point::Opening,
    Point::Opened,
    Point::Answered,
    Point::Finalized,
    Point::Paying,
    Point::Paid,
    Point::Returned,
    Point::Committed,
];
const AROUND_CALL: [Point; 5] =
    [Point::Reserved, Point::Opening, Point::Opened, Point::Answered, Point::Finalized];
const RESERVATIONS: &str = "SELECT id FROM reservations WHERE key = $1";
const PAYOUTS: &str = "SELECT id || ' ' || reservation || ' ' || transfer FROM payouts WHERE key = $1";
