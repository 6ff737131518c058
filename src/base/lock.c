/*-------------------------------------------------------------------------
 *
 * lock.c
 *	  Locks that keep two passes of a kind apart, or two that build for a platform.
 *
 * They are advisory locks of a class that the SQL functions for those cannot
 * name, so that nobody can take one away from us.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/lock.h"

#include "base/compat.h"

/* pg_advisory_lock(bigint) is class 1, pg_advisory_lock(int, int) class 2. */
#define PASS_LOCK_CLASS 3

PG_FUNCTION_INFO_V1(redrive__lock_pass);

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
