//! Payouts of the server in three phases: what is paid is reserved, an upstream makes the transfer, and the payout is
//! written down.

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use tower_idempotency::TxError;
use uuid::Uuid;

use crate::{
    journal::Reporter,
    payout::Service,
    role::{Directions, Writes},
    trap::Point,
};

/// Payouts, if the environment names an upstream and a journal.
pub fn router<DB: Writes>() -> Router {
    let (Some(service), Some(reporter)) = (Service::from_env(), Reporter::from_env()) else {
        return Router::new();
    };
    Router::new().route("/phased-payouts", post(pay_out::<DB>)).with_state(Desk { service, reporter })
}

#[derive(Clone, Debug)]
struct Desk {
    service: Service,
    reporter: Reporter,
}

/// A local step.
struct Step {
    name: &'static str,
    insert: &'static str,
    /// Where it has written.
    written: Point,
}

async fn pay_out<DB: Writes>(State(desk): State<Desk>, directions: Directions) -> Response {
    match desk.pay_out::<DB>(&directions).await {
        Ok(payout) => (StatusCode::CREATED, payout).into_response(),
        Err(error) => error.into_response(),
    }
}

impl Desk {
    async fn pay_out<DB: Writes>(&self, directions: &Directions) -> Result<String, TxError> {
        let reservation = self.perform::<DB>(directions, RESERVE, &[]).await?;
        directions.reach(Point::Reserved);
        let transfer = self.service.pay(directions).await?.id;
        directions.reach(Point::Finalized);
        let payout = self.perform::<DB>(directions, PAY, &[&reservation, &transfer]).await?;
        directions.reach(Point::Paid);
        Ok(format!("{payout} {reservation} {transfer}"))
    }

    /// Inserts a row with the key, an id of its own and these values. Returns the id.
    async fn perform<DB: Writes>(
        &self,
        directions: &Directions,
        step: Step,
        values: &[&str],
    ) -> Result<String, TxError> {
        let (idempotency, id) = (&directions.idempotency, Uuid::new_v4().to_string());
        let key = idempotency.key().as_str();
        let mut began = false;
        let row = [&[key, &id], values].concat();
        let write = async |tx: &mut DB::Connection| {
            began = true;
            self.reporter.tell(key, step.name).await;
            DB::run(tx, step.insert, &row).await?;
            directions.reach(step.written);
            Ok::<_, TxError>(id.clone())
        };
        let performed = idempotency.phase(step.name, write).await;
        if performed.is_err() && began {
            self.reporter.tell(key, &failed(step.name)).await;
        }
        performed
    }
}

/// What is told of a step that was rolled back.
pub fn failed(step: &str) -> String {
    format!("{step}-failed")
}

const RESERVE: Step = Step {
    name: "reserve",
    insert: "INSERT INTO reservations (key, id) VALUES ($1, $2)",
    written: Point::Reserving,
};
const PAY: Step = Step {
    name: "pay",
    insert: "INSERT INTO payouts (key, id, reservation, transfer) VALUES ($1, $2, $3, $4)",
    written: Point::Paying,
};
