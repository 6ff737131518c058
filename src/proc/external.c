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

static void
say_wakes_at(RedriveDatabase *entry, TimestampTz at)
{
	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry->wakes_at = at;
	LWLockRelease(redrive_shared->lock);
}

/*
 * Begin a turn: from now on our looks may miss what is committed.  Returns
 * whether a lease has ended.
 */
bool
redrive_external_begin(RedriveDatabase *entry)
{
	say_wakes_at(entry, DT_NOEND);
	return lease_ends_at <= GetCurrentTimestamp();
}

/* Fold what external workers have ended, and see when the next lease ends. */
void
redrive_external_look(RedriveDatabase *entry)
{
	bool		wanted = false;
	bool		isnull;

	TimestampTz now = GetCurrentTimestamp();

	if (entry->fold_wanted && now >= fold_from)
	{
		LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
		wanted = entry->fold_wanted;
		entry->fold_wanted = false;
		LWLockRelease(redrive_shared->lock);
	}
	if (wanted)
	{
		if (redrive_fold_ended())
		{
			LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
			entry->fold_wanted = true;
			LWLockRelease(redrive_shared->lock);
		}
		fold_from = GetCurrentTimestamp();
		fold_from += Max(FOLD_PAUSE_MS * INT64CONST(1000), (FOLD_SHARE - 1) * (fold_from - now));
	}
	redrive_sql_one_row(&next_lease, NULL, NULL);
	lease_ends_at = DatumGetTimestampTz(redrive_column(0, "ends_at", &isnull));
	if (isnull)
		lease_ends_at = DT_NOEND;
}

/* End a turn: return how long to sleep, at most ms. */
long
redrive_external_end(RedriveDatabase *entry, long ms)
{
	TimestampTz now = GetCurrentTimestamp();

	if (entry->fold_wanted)
		ms = Min(ms, fold_from > now ? (long) ((fold_from - now) / 1000 + 1) : 1);
	if (lease_ends_at <= now)
		ms = Min(ms, AGAIN_MS);
	else if (lease_ends_at - now < ms * INT64CONST(1000))
		ms = (long) ((lease_ends_at - now) / 1000 + 1);
	say_wakes_at(entry, now + ms * INT64CONST(1000));
	return ms;
}
