//! Certificates end; whoever has one gets another in time.

use std::{
    path::Path,
    pin::Pin,
    time::{Duration, SystemTime},
};

use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::sync::watch;

use crate::{Credentials, Error, Request};

/// The parts of a certificate's life, in hundredths, between which it is renewed, at a point that is chosen by chance: those that
/// were let in together do not ask together.
const FROM: u32 = 50;
const TO: u32 = 80;
/// After an attempt that failed; sooner when little time is left.
const RETRY: Duration = Duration::from_secs(600);
const SOONEST_RETRY: Duration = Duration::from_secs(1);
/// Between looks at the clock, which may be set meanwhile, and at least between renewals, should clocks be far apart.
const LOOK: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_secs(60);

/// A request that is being signed: the certificate and the authorities, in PEM, or why there is none.
pub type Asked = Pin<Box<dyn Future<Output = Result<(String, String), String>> + Send>>;

/// A number below `end`, by chance.
fn chance(end: u32) -> u32 {
    let mut bytes = [0; 4];
    // Without chance, all renew at the same point.
    let _ = SystemRandom::new().fill(&mut bytes);
    u32::from_le_bytes(bytes) % end
}

fn due(credentials: &Credentials) -> SystemTime {
    let (from, to) = credentials.validity();
    if credentials.check_valid().is_err() {
        // Made by a clock that was wrong, or run out.
        return SystemTime::UNIX_EPOCH;
    }
    let life = to.duration_since(from).unwrap_or_default();
    from + life / 100 * (FROM + chance(TO - FROM))
}

/// Keeps credentials valid, which are kept in `directory`: `ask` has a request signed. They are renewed early when `wanted` is the
/// digest of other authorities than they believe: whoever signs them says whom to believe. Never ends.
pub async fn keep_valid(
    credentials: Credentials,
    directory: &Path,
    mut wanted: watch::Receiver<Option<String>>,
    ask: impl Fn(String) -> Asked + Send + Sync,
) {
    let mut pause = Duration::ZERO;
    loop {
        let by_plan = due(&credentials);
        let comes = async {
            tokio::time::sleep(pause).await;
            while let Ok(left) = by_plan.duration_since(SystemTime::now())
                && credentials.check_valid().is_ok()
            {
                tokio::time::sleep(left.min(LOOK)).await;
            }
        };
        let believes_others = |wanted: &Option<String>| wanted.as_ref().is_some_and(|it| *it != credentials.digest());
        tokio::select! {
            () = comes => {}
            Ok(_) = wanted.wait_for(believes_others) => {}
        }
        while let Err(why) = renew(&credentials, directory, &ask).await {
            let left = credentials.validity().1.duration_since(SystemTime::now()).unwrap_or_default();
            tracing::warn!(why, left_s = left.as_secs(), "the certificate could not be renewed; trying again");
            let patience = if believes_others(&wanted.borrow()) { SOONEST_RETRY } else { RETRY };
            tokio::time::sleep(patience.min(left / 10).max(SOONEST_RETRY)).await;
        }
        pause = PAUSE;
        tracing::info!(identity = %credentials.identity(), "the certificate was renewed");
        if believes_others(&wanted.borrow()) {
            // Whoever signed it is behind whoever wants it.
            tokio::time::sleep(SOONEST_RETRY).await;
        }
    }
}

async fn renew(
    credentials: &Credentials,
    directory: &Path,
    ask: &(impl Fn(String) -> Asked + Send + Sync),
) -> Result<(), String> {
    let words = |error: Error| error.to_string();
    let request = Request::new().map_err(words)?;
    let (certificate, authorities) = ask(request.pem().to_owned()).await?;
    credentials.replace(directory, &request.key_pem(), &certificate, &authorities).map_err(words)
}
