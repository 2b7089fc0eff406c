//! Payouts of the server: its handler calls an upstream through an intent and then writes what came of it through the
//! transaction of its attempt.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{Extensions, HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use tower_idempotency::{IntentError, Resource, Tx};

use crate::{
    role::{self, Directions, Writes},
    support::upstream::UpstreamClient,
    trap::Point,
};

/// The upstream of transfers.
#[derive(Clone, Debug)]
pub struct Service {
    client: UpstreamClient,
    deduplicates: bool,
}

/// Payouts, if the environment names an upstream.
pub fn router<DB: Writes>() -> Router {
    let Some(service) = Service::from_env() else { return Router::new() };
    Router::new().route("/payouts", post(pay_out::<DB>)).with_state(service)
}

impl Service {
    /// The one that the environment names.
    pub fn from_env() -> Option<Self> {
        let address = std::env::var(UPSTREAM).ok()?;
        let address: SocketAddr = address.parse().expect("the upstream is named by its address");
        let deduplicates = std::env::var_os(DEDUPLICATES).is_some();
        Some(Self { client: UpstreamClient::new(address), deduplicates })
    }

    /// Makes one transfer for the request.
    pub async fn pay(&self, directions: &Directions) -> Result<Resource, IntentError> {
        let idempotency = &directions.idempotency;
        let reference = idempotency.key().as_str();
        let mut intent = idempotency.intent("bank.transfer").with_arguments(reference);
        intent = intent.with_timeout(TIMEOUT).with_grace(GRACE);
        if self.deduplicates {
            intent = intent.deduplicates_for(DEDUPLICATES_FOR);
        }
        let call = async |key| {
            directions.reach(Point::Opened);
            let answer = self.client.transfer(key, reference).await;
            directions.reach(Point::Answered);
            answer
        };
        intent.call(call).await
    }
}

async fn pay_out<DB: Writes>(
    State(service): State<Service>,
    directions: Directions,
    headers: HeaderMap,
    extensions: Extensions,
) -> Response {
    let id = match service.pay(&directions).await {
        Ok(transfer) => transfer.id,
        Err(error) => return error.into_response(),
    };
    directions.reach(Point::Finalized);
    if headers.contains_key(FAIL_AFTER_CALL) {
        return (StatusCode::SERVICE_UNAVAILABLE, "told to fail").into_response();
    }
    let mut tx = match Tx::<DB>::begin(&extensions).await {
        Ok(tx) => tx,
        Err(error) => return error.into_response(),
    };
    if let Err(error) = role::write::<DB>(&mut tx, &directions, &id).await {
        return (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response();
    }
    directions.reach(Point::Written);
    (StatusCode::CREATED, [("x-charge", id.clone())], format!("charge {id}")).into_response()
}

pub const UPSTREAM: &str = "UPSTREAM";
pub const DEDUPLICATES: &str = "UPSTREAM_DEDUPLICATES";
pub const FAIL_AFTER_CALL: &str = "x-fail-after-call";

/// Longer than a machine is busy: only an upstream that does not answer at all comes to it.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Intents dangle when the harness says so.
const GRACE: Duration = Duration::from_secs(60 * 60);
/// Calls are repeated in this time less a grace period.
const DEDUPLICATES_FOR: Duration = Duration::from_secs(24 * 60 * 60);
