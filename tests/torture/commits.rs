//! COMMITs whose request or reply is lost or late.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::{
    Run,
    books::{Books, Ledger},
    client::{Client, Order},
    lanes::{self, Todo},
    report::Check,
    role::{self, Settings},
    support::{
        proxy::{Fault, Proxy},
        schema::{self, Schema},
        served::serve,
    },
};

/// What becomes of a COMMIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    RequestLost,
    RequestLate,
    ReplyLost,
    ReplyLate,
}

impl Cut {
    const ALL: [Self; 4] = [Self::RequestLost, Self::RequestLate, Self::ReplyLost, Self::ReplyLate];

    fn name(self) -> &'static str {
        match self {
            Self::RequestLost => "request-lost",
            Self::RequestLate => "request-late",
            Self::ReplyLost => "reply-lost",
            Self::ReplyLate => "reply-late",
        }
    }

    fn fault(self) -> Fault {
        match self {
            Self::RequestLost | Self::RequestLate => Fault::HoldRequestsFrom(b"COMMIT"),
            Self::ReplyLost | Self::ReplyLate => Fault::HoldRepliesFrom(b"COMMIT"),
        }
    }
}

pub async fn run(run: &Run) {
    let schema = Schema::create().await;
    let books = Books::open(&schema.url()).await;
    let site = Arc::new(Site {
        url: schema.url(),
        books: books.clone(),
        client: Client::new(PATIENCE),
        ledger: Ledger::default(),
        todo: Todo::new(Cut::ALL, run.count(100)),
    });
    lanes::run(LANES, || lane(Arc::clone(&site))).await;
    let audit = site.ledger.audit(&books).await;
    for cut in Cut::ALL {
        let check = Check::new(format!("commits: {}, the last answer agrees with the table", cut.name()));
        audit.check(cut.name(), &check);
        check.print();
    }
    println!("commits: clients were told {}", site.client.refusals());
}

struct Site {
    url: String,
    books: Books,
    client: Client,
    ledger: Ledger,
    todo: Todo<Cut>,
}

/// An application with a network of its own, to which one cut after the other happens.
async fn lane(site: Arc<Site>) {
    let (proxy, url) = schema::through_proxy(&site.url);
    let settings = Settings {
        store_timeout: STORE_TIMEOUT,
        statement_timeout: STATEMENT_TIMEOUT,
        ..Settings::default()
    };
    let addresses = [serve(role::app(&url, &settings)).await];
    let insist = |key: String| site.client.insist(&addresses, Order::new(key), Instant::now() + PATIENCE);
    while let Some((cut, number)) = site.todo.take() {
        let key = format!("{}-{number}", cut.name());
        // The store is prepared, and its connections are open again.
        insist(format!("warm-{key}")).await.expect("an application that is not cut answers");
        proxy.set(cut.fault());
        let (first, ()) = tokio::join!(insist(key.clone()), happen(&site, &proxy, &key, cut, number));
        site.ledger.note(&key, first);
        site.ledger.note(&key, insist(key.clone()).await);
    }
}

async fn happen(site: &Site, proxy: &Proxy, key: &str, cut: Cut, number: usize) {
    proxy.until(|counts| counts.withheld > 0).await;
    if matches!(cut, Cut::ReplyLost | Cut::ReplyLate) {
        while site.books.entry(key).await.is_none() {
            sleep(Duration::from_millis(5)).await;
        }
    }
    match cut {
        Cut::RequestLost | Cut::ReplyLost => proxy.cut(),
        // Later than the layer waits, and for every other one later than the store does.
        Cut::RequestLate | Cut::ReplyLate => {
            let limit = if number.is_multiple_of(2) { STORE_TIMEOUT } else { STATEMENT_TIMEOUT };
            sleep(limit * 3 / 2).await;
        }
    }
    proxy.set(Fault::None);
}

const LANES: usize = 4;
const STORE_TIMEOUT: Duration = Duration::from_millis(500);
const STATEMENT_TIMEOUT: Duration = Duration::from_millis(1000);
const PATIENCE: Duration = Duration::from_secs(30);
