//! However backups depend on each other, none that is kept loses what it needs.

use proptest::prelude::*;

use super::{tests::*, *};
use crate::model::{BackupState, ScheduleRecord};

fn states() -> impl Strategy<Value = BackupState> {
    prop_oneof![
        6 => Just(BackupState::Available),
        1 => Just(BackupState::Failed),
        1 => Just(BackupState::Running),
        1 => Just(BackupState::Deleting),
    ]
}

proptest! {
    #[test]
    fn what_stays_has_all_that_it_needs(
        made in prop::collection::vec((states(), any::<Option<prop::sample::Index>>(), any::<bool>()), 1..40),
        keep_last in 1..6_u32,
        keep_days in 0..3_u32,
    ) {
        let vm = gold("web");
        let mut backups: Vec<BackupRecord> = Vec::new();
        for (number, (state, parent, scheduled)) in made.into_iter().enumerate() {
            let whole: Vec<u128> = backups
                .iter()
                .filter(|backup| backup.state == BackupState::Available)
                .map(|backup| backup.id.uuid().as_u128())
                .collect();
            let parent = parent.filter(|_| !whole.is_empty() && state != BackupState::Failed);
            let parent = parent.map(|index| *index.get(&whole));
            let hours = i64::try_from(number).unwrap_or(0) * 5;
            let mut new = backup(&vm, number as u128 + 1, hours, state, parent);
            if !scheduled {
                new.schedule = None;
            }
            backups.push(new);
        }
        let nightly = ScheduleRecord { keep_last, keep_days, ..schedule("nightly") };
        let state = state(&[vm], &[nightly], &backups);
        let gone = plan::expired(&state, at(200));
        for backup in &backups {
            let stays = !gone.contains(&backup.id) && backup.state != BackupState::Deleting;
            if stays {
                for needed in chain(&state, backup.id) {
                    prop_assert!(!gone.contains(&needed), "{} needs {needed}", backup.id);
                }
            }
            prop_assert!(backup.schedule.is_some() || !gone.contains(&backup.id));
        }
        let kept = backups.iter().filter(|backup| {
            backup.state == BackupState::Available && backup.schedule.is_some() && !gone.contains(&backup.id)
        });
        let all = backups.iter().filter(|backup| backup.state == BackupState::Available && backup.schedule.is_some());
        let least = all.count().min(keep_last as usize);
        prop_assert!(kept.count() >= least);
    }
}
