/*-------------------------------------------------------------------------
 *
 * external.c
 *	  What a supervisor does for external workers: take back what they have
 *	  held for too long, and fold what they have ended.
 *
 * A lease that is longer than the supervisor sleeps is seen in time; for a
 * shorter one, whoever claims looks how long it sleeps (wake.c).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "pgstat.h"
#include "utils/timestamp.h"

#include "base/spi_call.h"
#include "flow/claim.h"
#include "proc/external.h"

/* How soon after another fold the next one comes, but folds have no more than a tenth of the time. */
#define FOLD_PAUSE_MS 50
#define FOLD_SHARE 10

/* How soon we come back for a claim whose batch is locked. */
#define AGAIN_MS 100

static RedriveSql next_lease = {
	"SELECT redrive._next_lease() AS ends_at",
	0, {0}
};

static TimestampTz lease_ends_at = DT_NOEND;	/* the next one */
static TimestampTz fold_from = 0;	/* not before */

/*
 * Begin a turn: from now on our looks may miss what is committed.  Returns
 * whether a lease has ended.
 */
bool
redrive_external_begin(RedriveDatabase *entry)
{
	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry->wakes_at = DT_NOEND;
	/* what is wanted meanwhile is seen at the end of the turn */
	entry->folds_at = 0;
	LWLockRelease(redrive_shared->lock);
	return lease_ends_at <= GetCurrentTimestamp();
}

/* Fold what external workers have ended, if it is time. */
void
redrive_external_fold(RedriveDatabase *entry)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		wanted;

	if (now < fold_from)
		return;
	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	wanted = entry->fold_wanted;
	entry->fold_wanted = false;
	LWLockRelease(redrive_shared->lock);
	if (!wanted)
		return;
	pgstat_report_activity(STATE_RUNNING, "redrive: fold");
	if (redrive_fold_ended())
	{
		LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
		entry->fold_wanted = true;
		LWLockRelease(redrive_shared->lock);
	}
	fold_from = GetCurrentTimestamp();
	fold_from += Max(FOLD_PAUSE_MS * INT64CONST(1000), (FOLD_SHARE - 1) * (fold_from - now));
}

/* See when the next lease ends; return when to look again, at the latest at "at". */
TimestampTz
redrive_external_look(TimestampTz at)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		isnull;

	redrive_sql_one_row(&next_lease, NULL, NULL);
	lease_ends_at = DatumGetTimestampTz(redrive_column(0, "ends_at", &isnull));
	if (isnull)
		lease_ends_at = DT_NOEND;
	if (lease_ends_at <= now)
		return Min(at, now + AGAIN_MS * INT64CONST(1000));
	return Min(at, lease_ends_at);
}

/*
 * End a turn; the next whole one is at turn_at.  Returns how long to sleep in ms.
 *
 * After a fold we wake once more by ourselves: so who ends chunks all the time
 * does not wake us for each fold, and a fold is no whole turn.
 */
long
redrive_external_end(RedriveDatabase *entry, TimestampTz turn_at)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz folds_at = DT_NOEND;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	if (entry->fold_wanted || fold_from > now)
		folds_at = fold_from;
	entry->folds_at = folds_at;
	entry->wakes_at = turn_at;
	LWLockRelease(redrive_shared->lock);
	return Max(TimestampDifferenceMilliseconds(now, Min(turn_at, folds_at)), 1);
}
