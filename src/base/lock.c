/*-------------------------------------------------------------------------
 *
 * lock.c
 *	  Locks that keep two passes of a kind apart, two that build for a platform, or
 *	  those who plan for a platform and who drops it.
 *
 * They are advisory locks of classes that the SQL functions for those cannot
 * name, so that nobody can take one away from us.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "storage/lock.h"

#include "base/compat.h"

/* pg_advisory_lock(bigint) is class 1, pg_advisory_lock(int, int) class 2. */
#define PASS_LOCK_CLASS 3
#define PLANNING_LOCK_CLASS 4

PG_FUNCTION_INFO_V1(redrive__lock_pass);
PG_FUNCTION_INFO_V1(redrive__share_planning);
PG_FUNCTION_INFO_V1(redrive__await_planning);
PG_FUNCTION_INFO_V1(redrive__stop_planning);

/* SQL: _lock_pass(pass) */
Datum
redrive__lock_pass(PG_FUNCTION_ARGS)
{
	text	   *pass = PG_GETARG_TEXT_PP(0);
	const bool	session_lock = false;
	const bool	dont_wait = true;
	LOCKTAG		tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, 0,
						 hash_bytes((unsigned char *) VARDATA_ANY(pass), VARSIZE_ANY_EXHDR(pass)),
						 PASS_LOCK_CLASS);
	PG_RETURN_BOOL(LockAcquire(&tag, ExclusiveLock, session_lock, dont_wait) != LOCKACQUIRE_NOT_AVAIL);
}

/*
 * Those who plan for a platform share this lock.  With row locks alone they would pass whoever
 * waits to drop it, one after the other and without end; here there is a queue.
 */
static LOCKTAG
planning_lock(int32 platform_id)
{
	LOCKTAG		tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, 0, platform_id, PLANNING_LOCK_CLASS);
	return tag;
}

/* SQL: _share_planning(platform_id, wait) */
Datum
redrive__share_planning(PG_FUNCTION_ARGS)
{
	LOCKTAG		tag = planning_lock(PG_GETARG_INT32(0));
	const bool	session_lock = false;
	const bool	dont_wait = !PG_GETARG_BOOL(1);

	PG_RETURN_BOOL(LockAcquire(&tag, ShareLock, session_lock, dont_wait) != LOCKACQUIRE_NOT_AVAIL);
}

/* SQL: _await_planning(platform_id): wait for those who share it now; nobody waits behind us meanwhile. */
Datum
redrive__await_planning(PG_FUNCTION_ARGS)
{
	const bool	progress = false;

	WaitForLockers(planning_lock(PG_GETARG_INT32(0)), ExclusiveLock, progress);
	PG_RETURN_VOID();
}

/* SQL: _stop_planning(platform_id): wait in the queue, and let nobody share it before the transaction ends. */
Datum
redrive__stop_planning(PG_FUNCTION_ARGS)
{
	LOCKTAG		tag = planning_lock(PG_GETARG_INT32(0));
	const bool	session_lock = false;
	const bool	dont_wait = false;

	(void) LockAcquire(&tag, ExclusiveLock, session_lock, dont_wait);
	PG_RETURN_VOID();
}
