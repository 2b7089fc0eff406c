//! Recovery points: steps of local work that a later attempt skips.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    http::{Extensions, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use sqlx::{Postgres, Sqlite};
use tower_idempotency::{
    Idempotency, IdempotencyLayer, RejectionCode, Resource, Tx, TxError,
};

use crate::support::{
    db::Db,
    direct::{self, Answer},
    served::Count,
};

async fn smoke<DB: Db>() -> ()
where
    for<'a> &'a mut DB::Connection: Send,
{
    let home = DB::home().await;
    let pool = DB::pool(&home, 1);
    let store = DB::store(&pool);
    let mut c = DB::pool(&home, 1).acquire().await.unwrap();
    DB::run(&mut *c, "CREATE TABLE steps (name TEXT NOT NULL)").await.unwrap();
    drop(c);
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move |idem: Idempotency, ext: Extensions| {
        let run = counter.add();
        async move {
            let a: i64 = idem
                .phase("first", async |tx: &mut DB::Connection| {
                    DB::run(tx, "INSERT INTO steps VALUES ('first')").await?;
                    Ok::<i64, TxError>(7)
                })
                .await?;
            let r = idem.intent("up").call(async |_| Ok(Resource::new("x"))).await?;
            if run == 1 {
                return Err(TxError::from(sqlx::Error::RowNotFound));
            }
            let mut tx = Tx::<DB>::begin(&ext).await?;
            DB::run(&mut tx, "INSERT INTO steps VALUES ('last')").await?;
            Ok::<_, TxError>((StatusCode::CREATED, format!("{a} {} {run}", r.id)))
        }
    };
    let app: Router = Router::new().route("/charges", post(handler)).layer(IdempotencyLayer::new(store));
    for _ in 0..3 {
        let a = direct::send(&app, direct::charge("k")).await;
        println!("{:?} {:?}", a.status, a.body);
    }
    let n = DB::number(&mut *DB::pool(&home, 1).acquire().await.unwrap(), "SELECT count(*) FROM steps").await.unwrap();
    assert_eq!(n, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite() { smoke::<Sqlite>().await }
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres() { smoke::<Postgres>().await }
