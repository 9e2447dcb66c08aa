//! A container's life on its node, as a pure state machine: events in, actions out. It does no I/O and reads no clock.
//!
//! Containers are one-shot: one that has ended is cleaned up and never started again.

use warren_proto::v1::SecretKind;

/// Where a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its image is looked up and its snapshot made.
    Preparing,
    /// The runtime creates and starts it.
    Starting,
    /// It runs.
    Running,
    /// It was sent its stop signal.
    Stopping,
    /// It has ended; what it left is being removed.
    Cleaning,
    /// Nothing of it is left.
    Gone,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this code: 128 + signal for a signal.
    Exited(i32),
    /// With this code, after it was told to stop.
    Stopped(i32),
    /// It could not be run: trying again would be no different.
    Rejected(String),
    /// It could not be run this time.
    Failed(String),
    /// It was told to go before it ran.
    Cancelled,
}

/// What happens to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is no longer assigned.
    Remove,
    /// Its image and snapshot are ready, or why they cannot be.
    Prepared(Result<(), Ending>),
    /// It runs, or why it cannot.
    Started(Result<(), Ending>),
    /// Its first process exited.
    Exited(i32),
    /// It does not answer any more, and why that is thought.
    Unhealthy(String),
    /// Secrets or configs have another value: nothing of the state machine's.
    Renewed(Vec<(SecretKind, String)>),
    /// The time it had to stop is over.
    KillDue,
    /// Nothing of it is left.
    Cleaned,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Look up the image, make the snapshot and the container's record.
    Prepare,
    /// Create and start the task.
    Start,
    /// Send the stop signal, and say when its time is over.
    Stop,
    /// Send SIGKILL to all its processes, and say when that should have helped.
    Kill,
    /// Remove what is left of it.
    Clean,
    /// Tell the manager.
    Report,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    phase: Phase,
    removing: bool,
    /// Why it is stopped, if it is for being unhealthy.
    unhealthy: Option<String>,
    ending: Option<Ending>,
}

impl Lifecycle {
    /// A container that was just assigned, and what to do first.
    #[must_use]
    pub fn assigned() -> (Self, Vec<Action>) {
        let lifecycle = Self { phase: Phase::Preparing, removing: false, unhealthy: None, ending: None };
        (lifecycle, vec![Action::Report, Action::Prepare])
    }

    /// A container that was found running.
    #[must_use]
    pub fn adopted() -> (Self, Vec<Action>) {
        (Self { phase: Phase::Running, removing: false, unhealthy: None, ending: None }, vec![Action::Report])
    }

    /// A container that was found after its end.
    #[must_use]
    pub fn ended(ending: Ending) -> (Self, Vec<Action>) {
        let lifecycle = Self { phase: Phase::Cleaning, removing: false, unhealthy: None, ending: Some(ending) };
        (lifecycle, vec![Action::Report, Action::Clean])
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    fn end(&mut self, ending: Ending) -> Vec<Action> {
        self.ending = Some(ending);
        self.phase = Phase::Cleaning;
        vec![Action::Report, Action::Clean]
    }

    fn stop(&mut self) -> Vec<Action> {
        self.phase = Phase::Stopping;
        vec![Action::Stop]
    }

    /// Takes an event and says what to do. An event that does not belong to the phase is late and changes nothing.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        match (self.phase, event) {
            (Phase::Preparing | Phase::Starting, Event::Remove) => {
                // What was begun cannot be interrupted; its end decides.
                self.removing = true;
                Vec::new()
            }
            (Phase::Running, Event::Remove) => self.stop(),
            (Phase::Preparing, Event::Prepared(Ok(()))) if self.removing => self.end(Ending::Cancelled),
            (Phase::Preparing, Event::Prepared(Ok(()))) => {
                self.phase = Phase::Starting;
                vec![Action::Report, Action::Start]
            }
            (Phase::Preparing, Event::Prepared(Err(ending))) | (Phase::Starting, Event::Started(Err(ending))) => {
                self.end(if self.removing { Ending::Cancelled } else { ending })
            }
            (Phase::Starting, Event::Started(Ok(()))) => {
                self.phase = Phase::Running;
                let mut actions = vec![Action::Report];
                if self.removing {
                    actions.extend(self.stop());
                }
                actions
            }
            (Phase::Running, Event::Exited(code)) => self.end(Ending::Exited(code)),
            (Phase::Running, Event::Unhealthy(why)) => {
                self.unhealthy = Some(why);
                self.stop()
            }
            (Phase::Stopping, Event::Remove) => {
                // Now it is wanted gone, whatever it suffered from.
                self.unhealthy = None;
                Vec::new()
            }
            (Phase::Stopping, Event::Exited(code)) => match self.unhealthy.take() {
                Some(why) => self.end(Ending::Failed(format!("unhealthy: {why}"))),
                None => self.end(Ending::Stopped(code)),
            },
            (Phase::Stopping, Event::KillDue) => vec![Action::Kill],
            (Phase::Cleaning, Event::Cleaned) => {
                self.phase = Phase::Gone;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(events: impl IntoIterator<Item = Event>) -> (Lifecycle, Vec<Action>) {
        let (mut lifecycle, mut actions) = Lifecycle::assigned();
        for event in events {
            actions.extend(lifecycle.on(event));
        }
        (lifecycle, actions)
    }

    #[test]
    fn a_container_that_ends_by_itself_is_cleaned_up() {
        use Action::{Clean, Prepare, Report, Start};
        let events = [Event::Prepared(Ok(())), Event::Started(Ok(())), Event::Exited(3), Event::Cleaned];
        let (lifecycle, actions) = run(events);
        assert_eq!(actions, [Report, Prepare, Report, Start, Report, Report, Clean]);
        assert_eq!((lifecycle.phase(), lifecycle.ending()), (Phase::Gone, Some(&Ending::Exited(3))));
    }

    #[test]
    fn a_container_that_does_not_answer_is_stopped_and_has_failed() {
        let begin = [Event::Prepared(Ok(())), Event::Started(Ok(())), Event::Unhealthy("no answer".to_owned())];
        let (lifecycle, actions) = run(begin.clone().into_iter().chain([Event::Exited(0)]));
        assert!(actions.contains(&Action::Stop));
        assert_eq!(lifecycle.ending(), Some(&Ending::Failed("unhealthy: no answer".to_owned())));
        let (lifecycle, _) = run(begin.into_iter().chain([Event::Remove, Event::Exited(0)]));
        assert_eq!(lifecycle.ending(), Some(&Ending::Stopped(0)), "it was removed meanwhile");
    }

    #[test]
    fn a_container_that_ignores_its_signal_is_killed() {
        let events = [
            Event::Prepared(Ok(())),
            Event::Started(Ok(())),
            Event::Remove,
            Event::KillDue,
            Event::KillDue,
            Event::Exited(137),
        ];
        let (lifecycle, actions) = run(events);
        assert_eq!(actions.iter().filter(|action| **action == Action::Stop).count(), 1);
        assert_eq!(actions.iter().filter(|action| **action == Action::Kill).count(), 2);
        assert_eq!(lifecycle.ending(), Some(&Ending::Stopped(137)));
    }

    #[test]
    fn a_container_removed_while_it_starts_is_stopped_once_it_runs() {
        let (lifecycle, actions) = run([Event::Remove, Event::Prepared(Ok(()))]);
        assert_eq!((lifecycle.phase(), lifecycle.ending()), (Phase::Cleaning, Some(&Ending::Cancelled)));
        assert!(!actions.contains(&Action::Start));

        let (lifecycle, actions) = run([Event::Prepared(Ok(())), Event::Remove, Event::Started(Ok(()))]);
        assert_eq!(lifecycle.phase(), Phase::Stopping);
        assert_eq!(actions.last(), Some(&Action::Stop));
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Remove),
            Just(Event::Prepared(Ok(()))),
            Just(Event::Prepared(Err(Ending::Failed(String::new())))),
            Just(Event::Started(Ok(()))),
            Just(Event::Started(Err(Ending::Failed(String::new())))),
            (0..256).prop_map(Event::Exited),
            Just(Event::Unhealthy(String::new())),
            Just(Event::KillDue),
            Just(Event::Cleaned),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_it_starts_once_ends_once_and_is_cleaned_once(events in prop::collection::vec(event(), 0..40)) {
            let (lifecycle, actions) = run(events);
            let count = |wanted: Action| actions.iter().filter(|action| **action == wanted).count();
            prop_assert!(count(Action::Start) <= 1);
            prop_assert!(count(Action::Stop) <= 1);
            let ended = matches!(lifecycle.phase(), Phase::Cleaning | Phase::Gone);
            prop_assert_eq!(count(Action::Clean), usize::from(ended));
            prop_assert_eq!(lifecycle.ending().is_some(), ended);
        }
    }
}
