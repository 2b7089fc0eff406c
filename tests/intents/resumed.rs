//! A request in three phases that fails at every boundary in turn, and that the completer finishes.

use axum::{Router, http::StatusCode, routing::post};
use sqlx::Database;
use tower_idempotency::{CallFailure, Idempotency, RejectionCode, TxError, recovery::KeptRequests};
use uuid::Uuid;

use crate::{
    bank::Db,
    shop::{completer, restore_user, until},
    site::{Payer, Site, layer, on_both_stores},
    support::{
        direct::{self, Answer},
        served::Count,
        upstream::UpstreamClient,
    },
};

on_both_stores!(a_request_resumes_at_every_boundary_and_the_completer_finishes_it);

/// Where each run fails, and how often the first phase, the upstream and the second phase were begun until then.
const RUNS: [(&str, [usize; 3]); 8] = [
    ("entered", [0, 0, 0]),
    ("reserving", [1, 0, 0]), // the phase has written, and is rolled back
    ("reserved", [2, 0, 0]),
    ("sending", [2, 0, 0]),  // the call does not leave
    ("answered", [2, 1, 0]), // its answer is lost: one more for an upstream that deduplicates, from here on
    ("finalized", [2, 1, 0]),
    ("paying", [2, 1, 1]), // as reserving
    ("paid", [2, 1, 2]),
];

/// What the handler works with.
#[derive(Clone, Debug)]
struct Desk {
    payer: Payer,
    client: UpstreamClient,
    runs: Count,
    reserves: Count,
    pays: Count,
}

impl Desk {
    async fn pay_out<DB: Db>(self, idempotency: Idempotency) -> Result<(StatusCode, String), TxError> {
        let run = self.runs.add();
        let fails_at = |boundary: &str| RUNS.get(run - 1).is_some_and(|(fails_at, _)| *fails_at == boundary);
        let pass = |boundary: &str| match fails_at(boundary) {
            true if run.is_multiple_of(2) => panic!("told to at {boundary}"),
            true => Err(TxError::from(sqlx::Error::Protocol("told to".to_owned()))),
            false => Ok(()),
        };
        let insert = async |tx: &mut DB::Connection, step: &str, text: String| {
            let insert = format!("INSERT INTO steps VALUES ('{step}', '{text}')");
            DB::run(tx, &insert).await.map(|()| text).map_err(TxError::from)
        };
        pass("entered")?;
        let reserve = async |tx: &mut DB::Connection| {
            self.reserves.add();
            let reservation = insert(tx, "reserve", Uuid::new_v4().to_string()).await?;
            pass("reserving").map(|()| reservation)
        };
        let reservation = idempotency.phase("reserve", reserve).await?;
        pass("reserved")?;
        let call = async |key| {
            if fails_at("sending") {
                return Err(CallFailure::not_sent("told to"));
            }
            let transfer = self.client.transfer(key, "DE02 1000").await?;
            if fails_at("answered") { Err(CallFailure::unknown("told to")) } else { Ok(transfer) }
        };
        let transfer = self.payer.intent(&idempotency).call(call).await?;
        pass("finalized")?;
        let pay = async |tx: &mut DB::Connection| {
            self.pays.add();
            let payout = insert(tx, "pay", format!("{reservation} {}", transfer.id)).await?;
            pass("paying").map(|()| payout)
        };
        let payout = idempotency.phase("pay", pay).await?;
        pass("paid")?;
        Ok((StatusCode::CREATED, payout))
    }
}

/// Sends until the end of the attempt before is written down.
async fn send(app: &Router) -> Answer {
    let mut answer = direct::send(app, direct::charge("key")).await;
    until("an answer", async || {
        let ended = answer.rejection != Some(RejectionCode::InProgress);
        if !ended {
            answer = direct::send(app, direct::charge("key")).await;
        }
        ended
    })
    .await;
    answer
}

async fn a_request_resumes_at_every_boundary_and_the_completer_finishes_it<DB: Db>() {
    for site in Site::<DB>::both().await {
        site.bank.run("CREATE TABLE steps (name TEXT NOT NULL, what TEXT NOT NULL)").await;
        let [runs, reserves, pays] = [(); 3].map(|()| Count::default());
        let (payer, client) = (site.payer(), site.upstream.client());
        let desk = Desk { payer, client, runs: runs.clone(), reserves: reserves.clone(), pays: pays.clone() };
        let begun = || [reserves.get(), site.upstream.calls(), pays.get()];
        let layer = layer(&site.bank.store).with_kept_requests(KeptRequests::new());
        let handle = layer.handle();
        let handler = move |idempotency: Idempotency| desk.pay_out::<DB>(idempotency);
        let app = Router::new().route("/charges", post(handler)).layer(layer);
        let repeats = usize::from(site.upstream.deduplicates());
        for (run, (boundary, mut expected)) in RUNS.into_iter().enumerate() {
            let answer = send(&app).await;
            assert!(answer.status.is_server_error() || boundary == "answered", "{answer:?}");
            expected[1] += if run > 4 { repeats } else { 0 };
            assert_eq!((begun(), runs.get()), (expected, run + 1), "{boundary} {answer:?}");
            if boundary == "answered" && repeats == 0 {
                send(&app).await.assert_refused(RejectionCode::OutcomeUnknown);
                site.reconcile().await;
            }
        }
        let past = if DB::NAME == sqlx::Sqlite::NAME { "0" } else { "'epoch'" };
        let completer = completer(app.clone(), restore_user);
        until("the completer", async || {
            site.bank.run(&format!("UPDATE idempotency_requests SET next_at = {past}")).await;
            handle.complete_abandoned(&completer).await.unwrap().completed == 1
        })
        .await;
        let answer = send(&app).await;
        assert!(answer.status == StatusCode::CREATED && answer.is_replay(), "{answer:?}");
        assert_eq!(send(&app).await.body, answer.body);
        assert_eq!((begun(), runs.get()), ([2, 1 + repeats, 2], RUNS.len() + 1));
        site.assert_paid_once(1 + repeats).await;
        let payout = String::from_utf8(answer.body.to_vec()).unwrap();
        let (reservation, transfer) = payout.split_once(' ').unwrap();
        assert_eq!(transfer, site.upstream.transfers()[0].id);
        for (step, what) in [("reserve", reservation), ("pay", &payout)] {
            let rows = format!("SELECT count(*) FROM steps WHERE name = '{step}'");
            let named = format!("{rows} AND what = '{what}'");
            assert_eq!((site.bank.number(&rows).await, site.bank.number(&named).await), (1, 1), "{step}");
        }
    }
}
