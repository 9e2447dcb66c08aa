//! The node's images: what is here is used, what is not is pulled once however many containers wait for it, and what nobody
//! has used for a while goes.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use containerd_client::{services::v1 as api, tonic::Code};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use warren_proto::v1::PullPolicy;
use warren_registry::{Credentials, Registries};
use warren_spec::ImageName;

use super::{
    Containerd, Error, LocalImage,
    client::MAX_MESSAGE,
    pull::{Progress, pull},
};

/// Images that come from one registry at once. One that is slow holds up no other.
const PARALLEL: usize = 4;
/// Between looks at how far a pull is.
const LOOK: Duration = Duration::from_secs(1);
/// On images that were pulled: when one was last in use, in seconds since the epoch. What was imported stays.
const LAST_USED: &str = "warren.last-used";
/// How often it is looked for unused images, at least.
const COLLECT: Duration = Duration::from_secs(600);

/// What a container wants to run.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The image.
    pub name: ImageName,
    /// The bytes that it is to be, if that is settled.
    pub digest: Option<String>,
    /// When to ask a registry.
    pub policy: PullPolicy,
    /// In whose name.
    pub credentials: Credentials,
}

/// A pull under way. It is cancelled once nobody holds one of these.
#[derive(Clone, Debug)]
struct Pulling {
    progress: Progress,
    done: watch::Receiver<Option<Result<(), Arc<Error>>>>,
    interest: Arc<DropGuard>,
}

/// The same, held by nobody.
#[derive(Debug)]
struct Known {
    progress: Progress,
    done: watch::Receiver<Option<Result<(), Arc<Error>>>>,
    interest: Weak<DropGuard>,
}

/// Pulls under way, by what is pulled and in whose name: nobody is refused because of another's credentials.
type Pulls = HashMap<(String, Credentials), Known>;

/// What is here of an image.
enum Here {
    Absent,
    Usable(Box<LocalImage>),
    Unusable(Error),
}

/// The node's images. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Images {
    containerd: Containerd,
    registries: Arc<Registries>,
    pulls: Arc<Mutex<Pulls>>,
    gates: Arc<Mutex<HashMap<String, Arc<Semaphore>>>>,
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Images {
    /// The images of a daemon, and where others come from.
    #[must_use]
    pub fn new(containerd: Containerd, registries: Registries) -> Self {
        Self { containerd, registries: Arc::new(registries), pulls: Arc::default(), gates: Arc::default() }
    }

    /// Finds an image here or pulls it, as the policy has it. `watch` hears from time to time how many bytes of how many have
    /// come. A pull that nobody waits for any more, because this future was dropped, ends.
    ///
    /// # Errors
    ///
    /// When it is not here and cannot be pulled, or is not for this machine.
    pub async fn ensure(&self, wanted: &Wanted, mut watch: impl FnMut(u64, u64)) -> Result<LocalImage, Error> {
        let name = wanted.digest.as_deref().map_or_else(|| wanted.name.clone(), |digest| wanted.name.at(digest));
        // A digest's bytes do not change: there is nothing to ask for.
        let may_be_here = wanted.digest.is_some() || wanted.policy != PullPolicy::Always;
        let mut unusable = None;
        if may_be_here {
            match self.here(wanted, &name).await? {
                Here::Usable(image) => return Ok(*image),
                Here::Unusable(why) => unusable = Some(why),
                Here::Absent => {}
            }
        }
        if wanted.policy == PullPolicy::Never {
            return Err(unusable.unwrap_or_else(|| Error::NoSuchImage(wanted.name.to_string())));
        }
        let mut pulling = self.begin(&name, &wanted.credentials);
        loop {
            let (come, all) = pulling.progress.bytes();
            watch(come, all);
            let outcome = async { pulling.done.wait_for(Option::is_some).await.ok().and_then(|done| done.clone()) };
            if let Ok(outcome) = tokio::time::timeout(LOOK, outcome).await {
                // Whoever pulls says what came of it before it is gone.
                return match (outcome, unusable) {
                    (Some(Ok(())) | None, _) => self.containerd.image(&name).await,
                    // What is wrong with what is here is what can be mended here.
                    (Some(Err(error)), Some(why)) => {
                        tracing::warn!(image = %name, %error, "an image that is here is unusable, and it cannot be pulled");
                        Err(why)
                    }
                    (Some(Err(error)), None) => Err(Error::Shared(error)),
                };
            }
        }
    }

    /// Makes the layers of an image snapshots, each once however many containers wait for it. Dropping the future ends it.
    ///
    /// # Errors
    ///
    /// When a layer cannot be unpacked, or the daemon does not answer.
    pub async fn unpack(&self, image: &LocalImage, cancelled: &CancellationToken) -> Result<(), Error> {
        let leased = self.containerd.with_lease().await?;
        let unpacked = cancelled.run_until_cancelled(leased.unpack(image)).await;
        // What is left of a layer that was begun is garbage without the lease.
        leased.end_lease().await;
        unpacked.unwrap_or(Err(Error::Cancelled)).map(drop)
    }

    /// The image if it is here and whole, by its digest, or by a name that stands for that digest here.
    async fn here(&self, wanted: &Wanted, name: &ImageName) -> Result<Here, Error> {
        let mut here = Here::Absent;
        for candidate in BTreeSet::from([name.to_string(), wanted.name.to_string()]) {
            let Ok(candidate) = candidate.parse::<ImageName>() else { continue };
            match self.containerd.image(&candidate).await {
                Ok(image) if candidate == *name || wanted.digest.as_deref() == Some(image.target()) => {
                    if let Some(layer) = self.containerd.damaged_layer(&image).await? {
                        here = Here::Unusable(Error::bad_image(image.name, format!("{layer} is missing or damaged")));
                        continue;
                    }
                    self.note_use_again(&image.name).await;
                    return Ok(Here::Usable(Box::new(image)));
                }
                Err(error) if error.is_transient() => return Err(error),
                // A registry may have what it lacks.
                Err(error @ Error::BadImage { .. }) => here = Here::Unusable(error),
                // Another version: it is pulled.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(here)
    }

    /// Joins the pull of this image, or begins it.
    fn begin(&self, name: &ImageName, credentials: &Credentials) -> Pulling {
        let mut pulls = self.pulls.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.to_string(), credentials.clone());
        // One that is just being cancelled is not joined.
        if let Some(known) = pulls.get(&key)
            && let Some(interest) = known.interest.upgrade()
        {
            return Pulling { progress: known.progress.clone(), done: known.done.clone(), interest };
        }
        let cancelled = CancellationToken::new();
        let interest = Arc::new(cancelled.clone().drop_guard());
        let (sender, done) = watch::channel(None);
        let pulling = Pulling { progress: Progress::default(), done, interest };
        let known = Known {
            progress: pulling.progress.clone(),
            done: pulling.done.clone(),
            interest: Arc::downgrade(&pulling.interest),
        };
        pulls.insert(key.clone(), known);
        let (images, name, credentials) = (self.clone(), name.clone(), credentials.clone());
        let progress = pulling.progress.clone();
        tokio::spawn(async move {
            let gate = images.gate(name.registry());
            // The gate is never closed.
            let turn = cancelled.run_until_cancelled(gate.acquire()).await;
            let pulled = match turn {
                Some(_) => {
                    pull(&images.containerd, &images.registries, (&name, &credentials), &progress, &cancelled).await
                }
                None => Err(Error::Cancelled),
            };
            let noted = match pulled {
                Ok(()) => images.note_use(&key.0).await,
                Err(error) => Err(error),
            };
            let mut pulls = images.pulls.lock().unwrap_or_else(PoisonError::into_inner);
            // Another may have begun since nobody wanted this one.
            if pulls.get(&key).is_some_and(|known| known.done.same_channel(&sender.subscribe())) {
                pulls.remove(&key);
            }
            drop(pulls);
            drop(turn);
            sender.send_replace(Some(noted.map_err(Arc::new)));
        });
        pulling
    }

    /// What lets so many pulls at once from a registry.
    fn gate(&self, registry: &str) -> Arc<Semaphore> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        Arc::clone(gates.entry(registry.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(PARALLEL))))
    }

    async fn list(&self) -> Result<Vec<api::Image>, Error> {
        let request = self.containerd.request(api::ListImagesRequest::default());
        let mut client = self.containerd.client().images().max_decoding_message_size(MAX_MESSAGE);
        let listed = client.list(request).await.map_err(Error::call("listing images"))?;
        Ok(listed.into_inner().images)
    }

    /// Names and digests of all images here.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer.
    pub async fn all(&self) -> Result<Vec<(String, String)>, Error> {
        let images = self.list().await?.into_iter();
        Ok(images.map(|image| (image.name, image.target.unwrap_or_default().digest)).collect())
    }

    /// Removes an image's name, and what nothing else needs of it.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub async fn remove(&self, name: &str) -> Result<(), Error> {
        let request = self.containerd.request(api::DeleteImageRequest {
            name: name.to_owned(),
            sync: true,
            ..Default::default()
        });
        match self.containerd.client().images().delete(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Err(Error::NoSuchImage(name.to_owned())),
            Err(status) => Err(Error::call("removing an image")(status)),
        }
    }

    /// Notes that an image that was pulled is used: it is not to go before its container is made.
    async fn note_use_again(&self, name: &str) {
        let request = self.containerd.request(api::GetImageRequest { name: name.to_owned() });
        let known = self.containerd.client().images().get(request).await;
        let labels =
            known.ok().and_then(|known| known.into_inner().image).map(|image| image.labels).unwrap_or_default();
        if labels.contains_key(LAST_USED)
            && let Err(error) = self.note_use(name).await
        {
            tracing::debug!(%error, "could not note the use of an image");
        }
    }

    async fn note_use(&self, name: &str) -> Result<(), Error> {
        let image = api::Image {
            name: name.to_owned(),
            labels: HashMap::from([(LAST_USED.to_owned(), now().to_string())]),
            ..Default::default()
        };
        let update = self.containerd.request(api::UpdateImageRequest {
            image: Some(image),
            update_mask: Some(prost_types::FieldMask { paths: vec![format!("labels.{LAST_USED}")] }),
            ..Default::default()
        });
        self.containerd.client().images().update(update).await.map_err(Error::call("labelling an image"))?;
        Ok(())
    }

    /// Removes pulled images that no container has used for `unused`, until `shutdown`. Zero keeps them for ever.
    pub async fn collect(self, unused: Duration, shutdown: CancellationToken) {
        if unused.is_zero() {
            return;
        }
        let mut tick = tokio::time::interval(COLLECT.min(unused / 2).max(LOOK));
        while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
            if let Err(error) = self.collect_once(unused).await {
                tracing::debug!(%error, "unused images could not be looked for");
            }
        }
    }

    async fn collect_once(&self, unused: Duration) -> Result<(), Error> {
        let images = self.list().await?;
        // Listed after the images: one that a container was just made from is in use.
        let used = self.containerd.images_in_use().await?;
        for image in images {
            let Some(last) = image.labels.get(LAST_USED).and_then(|seconds| seconds.parse::<u64>().ok()) else {
                continue;
            };
            if used.contains(&image.name) {
                self.note_use(&image.name).await?;
            } else if Duration::from_secs(now().saturating_sub(last)) >= unused {
                tracing::info!(image = image.name, "removing an image that nobody uses");
                self.remove(&image.name).await?;
            }
        }
        Ok(())
    }
}
